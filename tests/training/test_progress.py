"""Progress is seen before the first evaluation, with a rate that is not rounded to nothing."""

import json
import time
from pathlib import Path

import pytest
import torch

from raykd.console import Progress
from raykd.orchestration import training
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import DataRef, Optim, StudentRef
from raykd.training import run_files
from raykd.training.arm import ONE_PROCESS
from raykd.training.run_arms import run_arms
from raykd.training.throughput import Pace
from raykd.training.trained_arm import read_record


def test_every_step_ticks_and_reports_come_with_evaluations(tmp_path):
    recipe = Recipe(
        technique="none",
        terms={"ce": {}},
        data=DataRef(stride=40),
        student=StudentRef(settings={"width": 8, "layers": 1}),
        optim=Optim(steps=5, evaluate_every=5),
    )
    ticks = []
    reports = []
    told = {}

    def report(arm, step, metrics):
        reports.append((arm, step))
        told[arm] = metrics

    run_arms(
        recipe,
        None,
        tmp_path,
        world=ONE_PROCESS,
        device=torch.device("cpu"),
        report=report,
        tick=lambda arm, step, pace: ticks.append((arm, step)),
    )
    arms = ("control-0", "student-0")
    assert ticks == [(arm, step) for arm in arms for step in range(1, 6)]
    assert reports == [(arm, 5) for arm in arms]
    for arm in arms:  # what a resumed training tells again is what it told
        record = read_record(tmp_path, arm)
        assert record
        assert record["history"] == [told[arm]]
        assert record["throughput"]["rows_per_second"] > 0


def test_a_tick_is_written_every_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TICK_S", 0.05)
    ticker = training._Ticker(tmp_path, workers=2)
    pace = Pace(rows=30, seconds=10.0, waiting=1.0)
    for step in range(1, 13):
        ticker("student-0", step, pace)
        time.sleep(0.01)
    lines = (tmp_path / run_files.PROGRESS).read_text().splitlines()
    assert 1 <= len(lines) <= 3
    line = json.loads(lines[0])
    assert line["val_accuracy"] is None
    assert line["rows_per_second"] == 2 * 30 / 10
    assert training._pace(line) == ", 6 rows/s, waiting for rows 10% of it"
    assert training._pace(line | {"waiting_share": 0.01}) == ", 6 rows/s"


def test_steps_before_an_evaluation_are_shown(tmp_path, capsys):
    progress = Progress("train", 100, "steps", every_s=0)
    watch = training._ProgressWatch(tmp_path, ["a-0", "b-0"], steps=50, progress=progress)
    with watch:
        time.sleep(0.1)
        for number in range(200):  # more than the end of the file that is read
            training._append_progress(tmp_path, "a-0", step=number % 50, metrics={})
        training._append_progress(tmp_path, "b-0", step=3, metrics={})
        end = time.monotonic() + 30
        while progress.done != 53 and time.monotonic() < end:
            time.sleep(0.05)
    said = capsys.readouterr().err
    assert "train   53/100 steps" in said
    assert said.rstrip().endswith("b-0")


@pytest.mark.parametrize(
    ("rate", "words"), [(0.18, "0.18 steps/s"), (3.0, "3 steps/s"), (1234.0, "1,234 steps/s")]
)
def test_a_slow_rate_is_told(rate, words, capsys):
    progress = Progress("train", 10_000_000, "steps", every_s=0)
    progress.started = time.monotonic() - 1000
    progress.advance(round(1000 * rate))
    assert words in capsys.readouterr().err


def test_no_file_is_no_progress(tmp_path):
    assert training._last_line(Path(tmp_path / "none")) is None


def test_a_line_that_was_torn_is_passed_over(tmp_path):
    training._append_progress(tmp_path, "a-0", step=1, metrics={})
    path = tmp_path / "progress.jsonl"
    whole = path.read_bytes()
    for torn in (whole[:-9] + whole, b"[]\n", b"7\n", b"{}\n", b"\xff\n"):
        path.write_bytes(whole + torn)
        last = training._last_line(path)
        assert last
        assert (last["arm"], last["step"], last["val_accuracy"]) == ("a-0", 1, None)
    path.write_bytes(b"[]\n")
    assert training._last_line(path) is None
