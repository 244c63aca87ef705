"""A Ray session: the cluster this process was given, or an embedded one on loopback behind its own
token.
"""

import logging
import os
import secrets
import signal
import threading
from typing import Any

from raykd.errors import InfraError, RaykdError

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if it were done
}


def connect(address: str | None = None) -> None:
    """Be connected to Ray: by what is connected already, `address` or RAY_ADDRESS, else an embedded
    cluster.

    The embedded cluster listens on loopback, asks for a token that only this process's children
    know, and ends with this process. InfraError if a named cluster does not answer.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        _prepare_embedded()
    import ray

    if ray.is_initialized():
        return
    terminate = signal.getsignal(signal.SIGTERM)
    loopback: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({} if address else loopback),
        )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        where = f"at {address}" if address else "as an embedded cluster"
        raise InfraError(
            f"Ray cannot be reached {where}: {_last_line(error)}; try `raykd doctor`"
        ) from None
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        # Ray's own handler prints a stack, and aborts a process that takes three seconds to end
        signal.signal(signal.SIGTERM, terminate)


def _prepare_embedded() -> None:
    """The environment that the embedded cluster's processes inherit: a token.

    Ray itself lets them find modules of the current directory; PYTHONPATH would put those before
    Python's own.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def plain_error(error: BaseException, stage: str) -> RaykdError:
    """The user's own fault behind a chain of Ray's wrappers, or an InfraError with the innermost
    cause.
    """
    chain: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        link = todo.pop()
        if not isinstance(link, BaseException) or link in chain:
            continue
        chain.append(link)
        failures = getattr(link, "worker_failures", None) or {}
        todo += [link.__cause__, link.__context__, getattr(link, "cause", None), *failures.values()]
    for link in chain:
        if isinstance(link, RaykdError) and not hasattr(
            link, "cause"
        ):  # not Ray's copy of it, which is a traceback
            return link
    deepest = chain[-1]
    return InfraError(
        f"{stage} failed after its retries: {type(deepest).__name__}: {_last_line(deepest)}"
    )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
