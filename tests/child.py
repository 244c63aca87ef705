"""Processes of a test's own: forked from a server that has imported torch and Ray once, so that
each starts at once.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = (
    "raykd.teacher.scorer",
    "raykd.stages.walk",
    "raykd.training.sharding",
    "torch._dynamo",  # which DDP imports
    "ray.train.torch",
    "ray.tune",
    "mlflow",
    "exporter",
)
CONTEXT.set_forkserver_preload(list(PRELOADED))


def start(function: Callable[..., Any], *args: Any, **environment: str) -> BaseProcess:
    """A process that runs `function(*args)` on one thread with these environment variables."""
    process = CONTEXT.Process(target=_run, args=(environment, function, args))
    process.start()
    return process


def wait(processes: Iterable[BaseProcess]) -> list[int | None]:
    """The exit codes of processes, minus the signal that killed one; none outlives ten minutes."""
    codes = []
    for process in processes:
        process.join(600)
        codes.append(process.exitcode)
        process.kill()
    return codes


def _run(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)
