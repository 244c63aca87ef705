"""A Ray session: the cluster this process was given, or an embedded one on loopback behind its own
token.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from raykd.errors import InfraError, RaykdError

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # else each scoring begins with an error about the arguments of actors that may be restarted
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if it were done
}
# where Ray keeps the error that an error of its own wraps
WRAPPED = ("cause", "controller_failure", "health_check_failure", "_base_exc")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KNOCK_S = 10
SAFE_PATH = "PYTHONSAFEPATH"  # of Python: its -P
_embedded = False  # whether `connect` has started the cluster that is connected
SOCKET_BYTES = 107  # that a Linux kernel takes in the name of a unix socket
LONGEST_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
# What a gRPC server answers with settings of its own: HTTP/2's opening words and empty settings.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def named_cluster(address: str | None = None) -> str | None:
    """The address of the cluster that the user names, by `address` or RAY_ADDRESS; None for an
    embedded one.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def prepare(address: str | None = None) -> None:
    """The environment that Ray needs, set before anything imports it.

    Ray settles on a way to authenticate when it is first imported, and training in this process
    imports it without starting a cluster. InfraError where no cluster can be started here.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if named_cluster(address) is None:
        _prepare_embedded()


def connect(address: str | None = None, *, dashboard: bool = True) -> None:
    """Be connected to Ray: by what is connected already, `address` or RAY_ADDRESS, else an embedded
    cluster.

    The embedded cluster listens on loopback, asks for a token that only this process's children
    know, and ends with this process. Its dashboard takes a third of its start; a group of workers
    needs it, because Ray Train asks it for the state of its actors. InfraError if a named cluster
    does not answer.
    """
    global _embedded
    prepare(address)
    address = named_cluster(address)
    import ray

    if ray.is_initialized():
        return
    if address:
        knock(address)
    _settle_authentication()
    terminate = signal.getsignal(signal.SIGTERM)
    loopback: dict[str, Any] = {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
    try:
        with nullcontext() if address else _current_directory_not_first():
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({} if address else loopback),
            )
    except Exception as error:  # Ray raises bare ones, too, of a node that starts too slowly
        where = f"at {address}" if address else "as an embedded cluster"
        raise InfraError(
            f"Ray cannot be reached {where}: {last_line(error)}; try `raykd doctor`"
        ) from None
    _embedded = address is None
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        # Ray's own handler prints a stack, and aborts a process that takes three seconds to end
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def _current_directory_not_first() -> Iterator[None]:
    """Processes that start within it do not begin to look for modules in the current directory.

    Some of Ray's own would: a random.py beside a recipe was theirs. Workers look there once they
    have a job.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


def is_embedded() -> bool:
    """Whether Ray runs as a cluster of this process's own."""
    return _embedded


def _prepare_embedded() -> None:
    """The environment that the embedded cluster's processes inherit: a token, whatever mode was
    inherited. A cluster without one runs the code of any user of this machine.

    Ray itself lets them find modules of the current directory; PYTHONPATH would put those before
    Python's own.
    """
    _check_temp_folder()
    os.environ["RAY_AUTH_MODE"] = "token"
    if not os.environ.get("RAY_AUTH_TOKEN"):  # it goes before that of a file
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_temp_folder() -> None:
    """InfraError where Ray's temporary folder makes the names of its sockets too long."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if variable is None:
        return
    folder = os.environ[variable]
    room = SOCKET_BYTES - len(f"/{LONGEST_SOCKET}")
    size = len(os.fsencode(os.path.abspath(folder)))
    if size > room:
        raise InfraError(
            f"{variable}: {folder} has {size} bytes, and {room} are the most: Ray's sockets lie "
            f"below it, whose whole names may have {SOCKET_BYTES} bytes; export RAY_TMPDIR=/tmp"
        )


def _settle_authentication() -> None:
    """Let Ray read the environment again, in case something has imported it before us."""
    from ray import _raylet  # compiled, of which a type checker sees no names

    raylet: Any = _raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def knock(address: str) -> None:
    """InfraError if no Ray head answers at `address`; Ray itself would try for minutes."""
    from ray._private import services

    try:
        is_auto = address == "auto"
        found = (services.canonicalize_bootstrap_address(address) or "") if is_auto else address
        parts = urlsplit(found if "//" in found else f"//{found}")
        asked = parts.hostname
        port = parts.port
    except (ValueError, ConnectionError) as error:
        raise InfraError(f"{address} names no Ray head: {error}; name HOST:PORT") from None
    if parts.scheme not in ("", "ray"):
        return  # a kind of address that Ray looks up elsewhere
    if asked is None or port is None:
        raise InfraError(f"{address} names no Ray head; name HOST:PORT")
    host: str = asked if parts.scheme else services.resolve_ip_for_localhost(asked)
    try:
        _say_hello(host, port)
    except OSError as error:
        advice = 'cluster/local.sh start && eval "$(cluster/local.sh env)", or unset RAY_ADDRESS'
        where = f"at {found}"
        if host not in (asked, *LOOPBACK):
            where += f", which Ray reads as {host}:{port}"
            advice = f"export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 for a head on {asked}; {advice}"
        raise InfraError(f"no Ray head answers {where}: {error}; {advice}") from None


def _say_hello(host: str, port: int) -> None:
    """OSError unless a gRPC server answers there."""
    with socket.create_connection((host, port), timeout=KNOCK_S) as connection:
        connection.settimeout(KNOCK_S)
        connection.sendall(HELLO)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != 4:  # the kind of a frame: settings
        raise ConnectionError("what listens there is no gRPC server")


def node_name() -> str:
    """What this process's node is called: its host and its address in the cluster."""
    import ray.util

    return f"{socket.gethostname()}, {ray.util.get_node_ip_address()}"


def at_node(fault: RaykdError) -> RaykdError:
    """The same fault, which now says where it was found."""
    fault.args = (f"{fault} (on node {node_name()})", *fault.args[1:])
    return fault


@contextmanager
def faults_with_node() -> Iterator[None]:
    """Within it a fault of ours says on which node it was met, where this is an actor of Ray's."""
    import ray

    try:
        yield
    except RaykdError as fault:
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
            raise at_node(fault) from None
        raise


def own_fault(error: BaseException) -> RaykdError | None:
    """What a repetition would meet again, among the causes of an error: a RaykdError that is no
    InfraError.
    """
    faults = [link for link in causes(error) if isinstance(link, RaykdError) and _is_ours(link)]
    return next((fault for fault in faults if not isinstance(fault, InfraError)), None)


def causes(error: BaseException) -> list[BaseException]:
    """An error and all that it wraps, the outermost first."""
    chain: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        link = todo.pop()
        if not isinstance(link, BaseException) or link in chain:
            continue
        chain.append(link)
        failures = getattr(link, "worker_failures", None) or {}
        wrapped = [getattr(link, name, None) for name in WRAPPED]
        todo += [link.__cause__, link.__context__, *wrapped, *failures.values()]
    return chain


def _is_ours(error: BaseException) -> bool:
    """Whether it is a RaykdError, and not Ray's copy of one, which is a traceback."""
    return isinstance(error, RaykdError) and not hasattr(error, "cause")


def plain_error(error: BaseException, stage: str) -> RaykdError:
    """The user's own fault behind a chain of Ray's wrappers, or an InfraError with the innermost
    cause.
    """
    chain = causes(error)
    for link in chain:
        if _is_ours(link):
            assert isinstance(link, RaykdError)
            return link
    if any(type(link).__name__ == "WorkerGroupStartupTimeoutError" for link in chain):
        return InfraError(
            f"{stage}: the workers could not be started within scale.start_timeout_s, several "
            "times; the cluster is full or a node is lost; lower scale.workers, or raise "
            "scale.start_timeout_s"
        )
    deepest = chain[-1]
    return InfraError(
        f"{stage} failed after its retries: {type(deepest).__name__}: {last_line(deepest)}"
    )


def last_line(error: BaseException) -> str:
    """The last line of what an error says, which in Ray's tracebacks is the cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
