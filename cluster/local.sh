#!/usr/bin/env bash
# A Ray head for this machine only: on loopback, behind a random token, stopped by its own process ids.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: cluster/local.sh start [--num-cpus N] | stop | status | env

  start    start a Ray head on 127.0.0.1 with token authentication, and wait until it answers
  stop     end the processes that start began, and no others
  status   say whether it runs (exit 0) or not (exit 3)
  env      print the lines a shell needs:  eval "$(cluster/local.sh env)"

RAYKD_LOCAL_PORT (6379) and RAYKD_LOCAL_DASHBOARD_PORT (8265) choose the ports; 0 takes a free one.
RAYKD_LOCAL_DIR (cluster/.local) keeps token, process ids and log: one folder for each cluster.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${RAYKD_LOCAL_DIR:-$here/.local}

say() { printf '%s\n' "$*" >&2; }

saved() { cat "$state/$1" 2>/dev/null || true; }

free_ports() { # N ports that were free a moment ago, held together so that they differ
  python3 - "$1" <<'PY'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*[s.getsockname()[1] for s in held])
PY
}

answers() { # the dashboard answers to our token
  python3 - "$1" "$state/token" 2>/dev/null <<'PY'
import sys, urllib.request
token = open(sys.argv[2]).read()
request = urllib.request.Request(f"http://{sys.argv[1]}/api/version", headers={"Authorization": f"Bearer {token}"})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).close()
PY
}

alive() { case $(ps -o stat= -p "$1" 2>/dev/null) in '' | Z*) return 1 ;; esac }

is_in() { [[ " ${*:2} " == *" $1 "* ]]; }

family() { # the given processes and all below them
  ps -A -o pid=,ppid= | awk -v roots="$*" '
    BEGIN { n = split(roots, root, " "); for (i = 1; i <= n; i++) keep[root[i]] = 1 }
    { parent[$1] = $2 }
    END {
      do { more = 0; for (p in parent) if (!(p in keep) && (parent[p] in keep)) { keep[p] = 1; more = 1 } } while (more)
      for (p in keep) if (p in parent) print p
    }'
}

ours() { # recorded processes that still are what they were: their command names our own folder
  local pid temp
  temp=$(saved temp)
  [ -n "$temp" ] || return 0
  for pid in $(saved pids); do
    if alive "$pid" && [[ "$(ps -ww -o command= -p "$pid")" == *"$temp"* ]]; then echo "$pid"; fi
  done
}

start() {
  local cpus=() port dashboard free temp head
  while [ $# -gt 0 ]; do
    case $1 in
      --num-cpus) cpus=(--num-cpus "${2:?--num-cpus needs a number}") && shift 2 ;;
      *) usage >&2 && exit 2 ;;
    esac
  done
  if [ -n "$(ours)" ]; then
    say "already running at $(saved dashboard)"
    return
  fi
  mkdir -p "$state"
  (umask 077 && rm -f "$state/token" && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$state/token")

  read -r -a free <<<"$(free_ports 7)"
  port=${RAYKD_LOCAL_PORT:-6379} && [ "$port" != 0 ] || port=${free[0]}
  dashboard=${RAYKD_LOCAL_DASHBOARD_PORT:-8265} && [ "$dashboard" != 0 ] || dashboard=${free[1]}
  temp=$(mktemp -d /tmp/raykd.XXXXXX) # short: Ray puts unix sockets below it
  echo "$temp" >"$state/temp"
  echo "127.0.0.1:$port" >"$state/address"
  echo "127.0.0.1:$dashboard" >"$state/dashboard"

  # RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 keeps every port on loopback; Linux else swaps 127.0.0.1 for the host's address.
  set -m # its own process group: Ctrl-C here does not reach it
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 \
    nohup ray start --head --block --node-ip-address 127.0.0.1 --port "$port" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port "${free[2]}" \
    --dashboard-agent-grpc-port "${free[3]}" --metrics-export-port "${free[4]}" \
    --runtime-env-agent-port "${free[5]}" --ray-client-server-port "${free[6]}" \
    --temp-dir "$temp" "${cpus[@]+"${cpus[@]}"}" </dev/null >"$state/log" 2>&1 &
  head=$!
  set +m
  echo "$head" | tee "$state/head" >"$state/pids"
  await_head "$head"
  say "running: dashboard and jobs at http://$(saved dashboard), cluster at $(saved address). Type next:"
  say "  eval \"\$($0 env)\""
}

await_head() {
  local deadline=$((SECONDS + ${RAYKD_LOCAL_WAIT_S:-120}))
  until answers "$(saved dashboard)"; do
    if ! alive "$1" || [ "$SECONDS" -ge "$deadline" ]; then
      say "Ray did not start; the end of $state/log:"
      tail -n 15 "$state/log" >&2
      stop
      exit 5
    fi
    family "$1" >"$state/pids"
    sleep 0.5
  done
  family "$1" >"$state/pids"
}

stop() {
  local roots all pid deadline
  roots=$(ours)
  if [ -z "$roots" ]; then
    say "not running"
  else
    # shellcheck disable=SC2086  # lists of numbers
    all=$(family $roots)
    # The head ends the others in order; told all at once, it waits half a minute for the ones already gone.
    # shellcheck disable=SC2086
    if is_in "$(saved head)" $roots; then kill -TERM "$(saved head)"; else kill -TERM $all; fi || true
    deadline=$((SECONDS + 12)) # an idle head ends in six; after jobs Ray waits half a minute for processes that are gone
    for pid in $all; do
      while alive "$pid" && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
      if alive "$pid"; then kill -KILL "$pid" 2>/dev/null || true; fi
    done
    say "stopped"
  fi
  case $(saved temp) in /tmp/raykd.*) rm -rf "$(saved temp)" ;; esac
  rm -f "$state/head" "$state/pids" "$state/temp" "$state/address" "$state/dashboard" "$state/token"
}

status() {
  if [ -n "$(ours)" ] && answers "$(saved dashboard)"; then
    say "running: dashboard and jobs at http://$(saved dashboard), cluster at $(saved address)"
  else
    say "not running"
    exit 3
  fi
}

print_env() {
  [ -n "$(ours)" ] || { say "not running; type: $0 start" && exit 3; }
  printf 'export RAY_AUTH_MODE=token\n'
  printf 'export RAY_AUTH_TOKEN_PATH=%q\n' "$state/token"
  printf 'export RAY_API_SERVER_ADDRESS=http://%s\n' "$(saved dashboard)"
  printf 'export RAY_ADDRESS=%s\n' "$(saved address)"
  printf 'export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0\n' # as in start: RAY_ADDRESS stays on loopback
}

case ${1:-} in
  start) shift && start "$@" ;;
  stop) stop ;;
  status) status ;;
  env) print_env ;;
  -h | --help | help) usage ;;
  *) usage >&2 && exit 2 ;;
esac
