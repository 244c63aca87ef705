"""A training step's precision, memory and speed, each against the plain way in the same process.

    python -m pipelines.bench.step [--only KEY ...]

The last line is JSON with every key. What this machine, or this version, cannot measure is null
there, and a line above it says why.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from pipelines.bench import bf16_language, overhead, parted, parts_of_student, step_memory
from pipelines.bench.table import machine


class NotMeasured(Exception):
    """Why a key has no figure here."""


def micro_loss_difference() -> float:
    """Loss and gradients of micro-batches of 1, 2 and 4 rows over the whole's, of every term."""
    apart, refused = parted.largest_difference()
    print(f"micro_loss_difference: not of {', '.join(refused)}, which refuse micro-batches")
    return apart


def bf16_step_ratio() -> float:
    """A language student's step in bf16 over one in fp32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags and "amx_bf16" not in flags:
        raise NotMeasured("this processor has no bf16 units, so it only imitates them")
    return bf16_language.step_ratio()


def bf16_quality_difference() -> float:
    """Held-out nats a token of a student of 5 M parameters that was trained in bf16, less those of
    one trained in fp32.
    """
    return bf16_language.quality_difference()


def head_memory_ratio() -> float:
    """Growth of peak memory in a step at 151,936 tokens, the head walked over multiplied out."""
    return step_memory.ratio("head", "whole")


def head_time_ratio() -> float:
    """CPU time of the same step."""
    return step_memory.time_ratio(rounds=3)


def recompute_memory_ratio() -> float:
    """Growth of peak memory in a step of eight blocks, computed again over kept."""
    return step_memory.ratio("again", "kept")


def shard_loss_difference() -> float:
    """The loss of a student in parts on two workers over one process's, at any of its steps."""
    return parts_of_student.loss_difference()


def shard_memory_ratio() -> float:
    """Bytes of parameters, gradients and optimiser on one of two workers, over all of them."""
    return parts_of_student.memory_ratio()


def checkpoint_stall_share() -> float:
    """Seconds in which a language student's training stands still for checkpoints, over all."""
    return bf16_language.stall_share()


@cache
def _overhead() -> dict[str, float]:
    """The ratios of `python -m pipelines.bench.overhead`, which are measured together."""
    return {figure.name: figure.reached for figure in overhead.measured()}


def ddp_step_ratio() -> float:
    """CPU time of a step of two Ray Train workers over one by hand under DDP."""
    return _overhead()["ddp_step_ratio"]


def train_step_ratio() -> float:
    """CPU time of a step of one Ray Train worker over one by hand."""
    return _overhead()["train_step_ratio"]


def score_ratio() -> float:
    """Rows a second of CPU through Ray Data over a forward pass and one Parquet file."""
    return _overhead()["score_ratio"]


MEASURES: dict[str, Callable[[], float]] = {
    "micro_loss_difference": micro_loss_difference,
    "head_memory_ratio": head_memory_ratio,
    "head_time_ratio": head_time_ratio,
    "bf16_step_ratio": bf16_step_ratio,
    "bf16_quality_difference": bf16_quality_difference,
    "recompute_memory_ratio": recompute_memory_ratio,
    "shard_loss_difference": shard_loss_difference,
    "shard_memory_ratio": shard_memory_ratio,
    "checkpoint_stall_share": checkpoint_stall_share,
    "ddp_step_ratio": ddp_step_ratio,
    "train_step_ratio": train_step_ratio,
    "score_ratio": score_ratio,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="KEY")
    only = parser.parse_args().only or list(MEASURES)
    torch.set_num_threads(1)
    print(machine())
    figures: dict[str, float | None] = {}
    for key, measure in MEASURES.items():
        figures[key] = None
        if key not in only:
            continue
        try:
            figures[key] = float(f"{measure():.4g}")
            print(f"{key}: {figures[key]}", flush=True)
        except NotMeasured as reason:
            print(f"{key}: null, because {reason}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
