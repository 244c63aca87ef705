"""Rows that are read in parts against rows in memory: what is read, held, waited for and learned.

    python -m pipelines.bench.rows

* bytes_read_ratio: bytes that four workers with a cache each read in an epoch, over the data.
* trainer_peak_ratio: peak anonymous memory of a training on 2 GB of wide rows, over 128 MB of them;
  it measures itself on 512 MB of validation rows and writes its answers to as many test rows, over
  32 MB of each, of which a part is read ahead, too.
* step_ratio_blocks: wall time of a training step on parts over one on rows in memory, in turns.
* quality_blocks_minus_rows: validation accuracy on the gestures, blocks minus rows, of three seeds.
* driver_peak_ratio, scorer_peak_ratio: peak anonymous memory while 2 GB of Parquet are scored, over
  128 MB of it; start_seconds_ratio: the time to the first shard; digests_per_process: how often the
  driver hashes all data, and digests_per_actor a scoring actor; score_ratio: rows a second over a
  bare loop on the same Parquet.

Wide rows are drawn anew from a part's number each time that the part is read.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.bench import part_scoring
from pipelines.bench.stream import together
from pipelines.bench.table import Clock, machine
from raykd import data
from raykd.data import Dataset, Rows
from raykd.data.table import Held, Part, Source, Table, read_split
from raykd.files.digests import digest_of
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.recipe import Recipe, Scale
from raykd.recipe.tables import Optim, TermSpec
from raykd.stages.load import load
from raykd.training.arm import Arm, World
from raykd.training.arms import arms_of
from raykd.training.device_rows import to_device
from raykd.training.loop import train
from raykd.training.measured import measured, tally, write
from raykd.training.part_rows import PartRows
from raykd.training.phases import spans
from raykd.training.run_arms import ArmRunner
from raykd.training.state import Learner, State
from raykd.training.step import TrainStep
from raykd.training.train_rows import TrainRows

CPU = torch.device("cpu")
CLASSES = 4
LABELS = Arm("control", 0, {"ce": TermSpec()})
NOTHING: frozenset[str] = frozenset()
WORKERS = 4
GESTURES = "examples/gesture/few_labels.toml"
SEEDS = (0, 1, 2)
T_95 = 4.303  # Student's t of two degrees of freedom
ROUNDS = 12
TURN = 10


@dataclass(frozen=True)
class Made:
    """Series of one class each, drawn by their part's number."""

    parts: int
    rows: int  # of a part
    steps: int
    channels: int
    measured: int = 0  # parts of validation and test rows, as many of each
    reads: list[int] = field(default_factory=list)  # numbers of the parts that were read

    def table(self) -> Table:
        splits = ["train"] * self.parts + ["val"] * self.measured + ["test"] * self.measured
        parts = [
            Part(number, split, self.rows, self.rows, "", number)
            for number, split in enumerate(splits)
        ]
        shape = {"channels": self.channels, "classes": CLASSES, "steps": self.steps}
        digest = digest_of([splits, self.rows, shape])
        return Table("made", "series", tuple("abcd"), shape, digest, tuple(parts))

    def read(self, part: Part) -> Rows:
        self.reads.append(part.number)
        draw = np.random.default_rng(part.number)
        label = draw.integers(0, CLASSES, part.rows)
        inputs = draw.standard_normal((part.rows, self.steps, self.channels), np.float32)
        inputs[:, :, 0] += label[:, None]
        row_id = part.first_id + np.arange(part.rows)
        mask = np.ones(inputs.shape[:2], bool)
        return Rows(row_id, inputs, mask, label, row_id)


@dataclass(frozen=True)
class Cut:
    """A data set in memory as parts of so many rows."""

    dataset: Dataset
    rows: int

    def table(self) -> Table:
        parts: list[Part] = []
        for split, whole in self.dataset.splits.items():
            for group, first in enumerate(range(0, len(whole), self.rows)):
                here = whole.take(slice(first, first + self.rows))
                labelled = int(here.labelled.sum())
                parts.append(Part(len(parts), split, len(here), labelled, "", group))
        return replace(Held(self.dataset).table(), parts=tuple(parts))

    def read(self, part: Part) -> Rows:
        first = part.group * self.rows
        return self.dataset.splits[part.split].take(slice(first, first + self.rows))


@contextmanager
def own_cache() -> Iterator[None]:
    """A cache of its own for what is made inside."""
    before = os.environ.get("RAYKD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAYKD_CACHE"] = folder
        yield
    os.environ.pop("RAYKD_CACHE")
    if before is not None:
        os.environ["RAYKD_CACHE"] = before


def bytes_read(parts: int) -> float:
    """What four workers read of narrow rows in an epoch, over what there is.

    Each has a cache that holds its lanes' windows, some sixth of the data.
    """
    optim = Optim(batch=64, lanes=64, window=4, steps=10**9)
    read = 0
    for rank in range(WORKERS):
        source = Made(parts, 128, 8, 16)
        room = 1.2 * 128 * 560 * (optim.window + 1) * optim.lanes / WORKERS / 1e9
        with own_cache():
            rows = part_rows(source, Scale(cache_gb=room, workers=(WORKERS, WORKERS)))
            order = rows.order(optim, 0)
            share = World(rank, WORKERS).share(optim.batch)
            for step in range(parts * 128 // optim.batch):
                rows.expect(order, step, share)
                rows.batch(torch.from_numpy(order.rows(step, share)))
            rows.close()
        read += len(source.reads)
    return read / parts


def part_rows(source: Source, scale: Scale) -> PartRows:
    return PartRows(source, "train", None, NOTHING, CPU, None, scale)


def trained(parts: int, steps: int) -> float:
    """The loss of a small student after a training on so many parts of 16 MiB."""
    with own_cache():
        source = Made(parts, 1024, 64, 64, measured=max(parts // 4, 2))
        scale = Scale(cache_gb=0.6, readers=2)
        rows = part_rows(source, scale)
        val, test = (measured(source, split, None, CPU, scale=scale) for split in ("val", "test"))
        optim = Optim(steps=steps, batch=128, lanes=8, window=2, evaluate_every=steps)
        student = Adapter(SeriesEncoder(channels=64, classes=CLASSES, steps=64, width=8, layers=1))
        state = train(LABELS, optim, student, rows, lambda student: tally(student, val).metrics())
        with tempfile.TemporaryDirectory() as folder:
            write(student, test, Path(folder, "said.parquet"))
        for each in (rows, val, test):
            each.close()
    return state.history[-1]["loss"]


def peaks(small: int, steps: int) -> tuple[float, float]:
    """Megabytes of anonymous memory at the peak of a training on `small` parts, and on 16 times."""
    found = []
    for parts in (small, 16 * small):
        _, peak, _ = together((trained, parts, steps))
        found.append(peak / 1e6)
    return found[0], found[1]


def steps_in_turns(rounds: int) -> tuple[float, float]:
    """Wall and CPU time of a step on parts over one on rows in memory, as medians of rounds."""
    source = Made(16, 256, 64, 16)
    optim = Optim(steps=1 << 20, batch=128, lanes=64, order="blocks")
    whole = read_split(source, "train")
    with own_cache():
        parts = part_rows(source, Scale(readers=2))
        stepping = [
            stepper(optim, rows) for rows in (parts, to_device(whole, "train", None, NOTHING, CPU))
        ]
        clock = Clock()
        seconds: list[list[tuple[float, float]]] = []
        for _ in range(rounds + 1):
            seconds.append([])
            for step in stepping:
                clock.read()
                for _ in range(TURN):
                    step()
                    step.state.step += 1
                seconds[-1].append(clock.read())
        for step in stepping:
            step.close()
        parts.close()
    cpu, wall = (np.array(seconds)[1:, 0] / np.array(seconds)[1:, 1]).T
    return float(np.median(wall)), float(np.median(cpu))


def stepper(optim: Optim, rows: TrainRows) -> TrainStep:
    torch.manual_seed(0)
    student = Adapter(SeriesEncoder(channels=16, classes=CLASSES, steps=64, width=64, layers=2))
    learner = Learner(student, Objective(LABELS.terms))
    adamw = torch.optim.AdamW(learner.parameters(), optim.learning_rate, fused=True)
    step = TrainStep(LABELS, optim, rows, World(), State(learner, adamw))
    step.enter(spans((), optim.steps)[0])
    return step


def quality(steps: int) -> tuple[float, float, float]:
    """Validation accuracy in blocks minus in rows: the mean over seeds, and its 95 % interval."""
    recipe = load(GESTURES, (f"optim.steps={steps}", f"seeds={list(SEEDS)}", "control=true"))
    dataset = data.load(recipe.data)
    in_rows = accuracies(recipe, Held(dataset))
    optim = recipe.optim.model_copy(update={"order": "blocks", "lanes": 32})
    in_blocks = accuracies(recipe.model_copy(update={"optim": optim}), Cut(dataset, 64))
    difference = np.array(in_blocks) - np.array(in_rows)
    print(f"gestures, labels alone: rows {in_rows}, blocks {in_blocks}")
    half = T_95 * difference.std(ddof=1) / len(SEEDS) ** 0.5
    return difference.mean(), difference.mean() - half, difference.mean() + half


def accuracies(recipe: Recipe, source: Source) -> list[float]:
    """The last validation accuracy of the control of each seed."""
    with own_cache():
        shop = ArmRunner(recipe, None, CPU, source=source)
        arms = [arm for arm in arms_of(recipe) if arm.name == "control"]
        last = [shop.train_arm(arm, shop.student(arm)).kept for arm in arms]
        shop.train.close()
    return [round(float(metrics["val_accuracy"]), 4) for metrics in last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a sixteenth of the data and steps")
    share = 16 if parser.parse_args().smoke else 1
    torch.set_num_threads(1)
    print(machine())
    figures: dict[str, Any] = {"bytes_read_ratio": bytes_read(640 // (1 if share == 1 else 4))}
    wall, cpu = steps_in_turns(ROUNDS)
    figures |= {"step_ratio_blocks": wall, "step_ratio_blocks_cpu": cpu}
    small, large = peaks(max(8 // share, 1), 1024 // share)
    print(f"peak of a trainer: {small:.1f} MB, with 16 times the rows {large:.1f} MB")
    figures["trainer_peak_ratio"] = large / small
    with tempfile.TemporaryDirectory() as temporary:
        figures |= part_scoring.measure(max(8 // share, 2), Path(temporary))
    mean, low, high = quality(2000 // share)
    figures |= {"quality_blocks_minus_rows": mean, "quality_low": low, "quality_high": high}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
