"""The road to a cluster, on this machine: a head behind a token, jobs sent to it, and nothing left
when it stops.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command import PATIENT, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
LOCAL = ROOT / "cluster" / "local.sh"
CLUSTER_README = (ROOT / "cluster" / "README.md").read_text()
BIN = str(Path(sys.executable).parent)


def environment(folder: Path) -> dict[str, str]:
    """A shell's environment that knows of no other cluster."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | PATIENT
    return plain | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder),
        "COLUMNS": "80",  # ps cuts what it tells to these
        "RAYKD_LOCAL_DIR": str(folder / "local"),
        "RAYKD_LOCAL_PORT": "0",
        "RAYKD_LOCAL_DASHBOARD_PORT": "0",
        "RAYKD_LOCAL_WAIT_S": "600",
    }


def call(*argv: object, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    asked = [str(a) for a in argv]
    return subprocess.run(asked, cwd=cwd, env=env, capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment that `cluster/local.sh env` gives a shell, while the head runs."""
    env = environment(tmp_path_factory.mktemp("local"))
    started = call(LOCAL, "start", "--num-cpus", 2, env=env)
    assert started.returncode == 0, started.stderr
    lines = call(LOCAL, "env", env=env).stdout.splitlines()
    given = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    try:
        yield env | given
    finally:
        call(LOCAL, "stop", env=env)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What a job needs of the repository, as its working directory."""
    folder = tmp_path_factory.mktemp("job") / "work"
    for name in ("raykd", "pipelines", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head: dict[str, str], sources: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    return call(
        *("ray", "job", "submit", "--working-dir", ".", "--", sys.executable, "-m", *argv),
        env=head,
        cwd=sources,
    )


def test_nobody_without_the_token_is_let_in(head):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused, opener.open(url, timeout=300):
        pass
    assert refused.value.code in (401, 403)
    refused.value.close()
    token = Path(head["RAY_AUTH_TOKEN_PATH"]).read_text()
    with opener.open(
        urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=300
    ) as answer:
        assert answer.status == 200


def test_readmes_job_walks_the_whole_example(head, sources):
    told = re.search(r"ray job submit .* --smoke$", CLUSTER_README, re.M)
    assert told
    line = f"{told[0]} --set data.stride=40"
    done = call("bash", "-c", line, env=head | {"PWD": str(sources)}, cwd=sources)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(sources.glob("runs/gesture-*/report.json")).read_bytes())
    assert len(report["search"]["trials"]) == 2  # of --smoke


def test_a_job_may_not_leave_its_results_where_ray_deletes_them(head, sources):
    done = submit(head, sources, "pipelines.report", "examples/gesture/recipe.toml")
    assert done.returncode != 0
    assert "--out runs: lies in the folder that Ray unpacked" in done.stdout


def test_what_env_prints_leads_a_command_to_the_head(head, tiny, tmp_path):
    """It hung: Ray read 127.0.0.1 as this machine's address, where the head does not listen."""
    command = (sys.executable, "-m", "raykd.cli", "run", tiny, "--smoke", "--out", tmp_path)
    done = call(*command, env=head | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("tiny-*/report.json"))
    status = call("ray", "status", env=head)
    assert status.returncode == 0, status.stderr
    assert "2.0 CPU" in status.stdout


def test_a_job_with_a_broken_recipe_fails(head, sources):
    """And README's two lines tell its exit code, which Ray's own command does not."""
    submitting, asking = re.findall(r"^  (ray job submit .*|curl .*)$", CLUSTER_README, re.M)
    broken = "examples/gesture/recipe.toml --set optim.stepz=1"
    line = submitting.replace("recipe.toml --out /shared/runs", broken)
    assert line != submitting
    done = call("bash", "-c", line, env=head, cwd=sources)
    assert done.returncode != 0
    assert "optim.stepz: unknown key. Did you mean steps?" in done.stdout
    told = call("bash", "-c", asking, env=head | {"no_proxy": "*"})
    assert json.loads(told.stdout)["driver_exit_code"] == 2


def test_stop_ends_every_process_of_the_head_and_no_other(head, sources):
    temp = (Path(head["RAYKD_LOCAL_DIR"]) / "temp").read_text().strip()
    assert others(temp)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        stopped = call(LOCAL, "stop", env=head)
        assert stopped.returncode == 0, stopped.stderr
        assert others(temp) == []
        assert not Path(temp).exists()
        assert list(sources.glob("runs/gesture-*/report.json"))
        assert list(sources.glob("runs/gesture-*/artefact/manifest.json"))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def others(temp: str) -> list[list[str]]:
    """The command lines of living processes that name the head's own folder."""
    found = [process.info for process in psutil.process_iter(["cmdline", "status"])]
    lines = [
        info["cmdline"]
        for info in found
        if info["status"] != psutil.STATUS_ZOMBIE and info["cmdline"]
    ]
    return [line for line in lines if any(temp in part for part in line)]
