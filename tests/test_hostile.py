"""Hostile inputs: each has a documented exit code, a short message, and no effect elsewhere."""

import math
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import by_hand
import folders
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import (
    disks,
    environment,
    folders_hf,
    harness,
    modules,
    names,
    recipes,
    rows,
    runs,
    shadows,
    stores,
)
from hostile.harness import INPUTS, Asked, Home, Nest
from safetensors.torch import save_file

from raykd.stages.load import load

KINDS = (
    disks,
    environment,
    folders_hf,
    modules,
    names,
    recipes,
    rows,
    runs,
    shadows,
    stores,
)  # each registers its inputs
MINE = '''
"""A user's own teacher."""
import torch
from torch import nn


class Mean(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        self.inner = nn.Linear(channels, width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs):
        return self.head(torch.tanh(self.inner(inputs)))


def teacher(*, channels, classes, width=4):
    return Mean(channels, classes, width)
'''
OWN = """
name = "own"
technique = "none"
[data]
source = "./rows"
[student.settings]
width = 4
[optim]
steps = 4
batch = 8
evaluate_every = 2
[track]
uri = "http://127.0.0.1:9"
"""
DONE = """
name = "done"
[data]
source = "./rows"
[teacher]
model = "mine:teacher"
weights = "teacher.safetensors"
[student.settings]
width = 4
[store]
rows_per_shard = 8
[optim]
steps = 4
batch = 8
evaluate_every = 2
[track]
uri = "http://127.0.0.1:9"
"""


def table() -> pa.Table:
    """Two classes in three splits, four rows each, eight steps of two channels."""
    wave = [[[math.sin(i + t), math.cos(i * t)] for t in range(8)] for i in range(24)]
    rows = [
        {"inputs": steps, "label": "ab"[i % 2], "split": ("train", "val", "test")[i % 3]}
        for i, steps in enumerate(wave)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    """The process that all commands are forked from."""
    nest = Nest()
    yield nest
    print(f"commands: {nest.cpu_s:.0f} s of CPU")
    nest.close()


@pytest.fixture(scope="module")
def finished(nest, tmp_path_factory) -> Path:
    """`here` with recipes over own rows, and `out` with a finished run of one of them."""
    folder = tmp_path_factory.mktemp("finished")
    here = folder / "here"
    (here / "rows").mkdir(parents=True)
    pq.write_table(table(), here / "rows" / "part.parquet")
    (here / "mine.py").write_text(MINE)
    (here / "own.toml").write_text(OWN)
    (here / "done.toml").write_text(DONE)
    torch.manual_seed(0)
    weights = {
        "inner.weight": torch.randn(4, 2),
        "inner.bias": torch.randn(4),
        "head.weight": torch.randn(2, 4),
        "head.bias": torch.randn(2),
    }
    save_file(weights, here / "teacher.safetensors")
    with chdir(here):  # where mine.py is
        by_hand.score(load("done.toml"), folder / "out" / "stores")
    sys.modules.pop("mine")
    home = Home(folder, folder, folder)
    done = nest.carry_out(home, home.asked("run", "done.toml", code=0, limit_s=600))
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A recipe over text, whose teacher is a folder as Hugging Face writes it."""
    return folders.home(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("name", INPUTS)
def test_a_hostile_input_ends_with_its_code_and_touches_nothing(
    name, nest, finished, texts, tmp_path
):
    home = Home(tmp_path, finished, texts)
    home.prepare()
    asked: Asked | None = INPUTS[name](home)
    while asked is not None:
        before = harness.snapshot(home)
        done = harness.carry_out(nest, home, asked)
        found = harness.faults(home, asked, done, before)
        assert not found, "\n".join([*found, "", done.err[-2500:]])
        asked = asked.then
