"""What a killed process costs: time, and not one bit of the result.

The kills are real (SIGKILL at a named point, once), the workers are Ray's, and each result is
compared with that of the same recipe left alone.
"""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Done, in_workers, raykd, start, trained, until
from safetensors.numpy import load, load_file

pytestmark = pytest.mark.ray
PHASES = """
[[phases]]
until = 0.5
[[phases]]
until = 1.0
quant = { weights = "ternary", scale = "learned", activations = "none", rest = "int8" }
"""


def fatal(fault: str, fired: Path) -> dict[str, str]:
    """Environment variables that kill the first process to reach `fault`, and leave the file
    `fired`.
    """
    return {"RAYKD_FAULT": fault, "RAYKD_FAULT_FIRED": str(fired)}


def alike(out: Path, reference: Path) -> bool:
    """Whether every arm's weights are those of the reference, up to the last bits.

    Mostly they are bit-equal. But CPU kernels choose by the alignment of memory, so that two
    undisturbed runs of two workers were seen to differ too; a lost or repeated step moves weights
    by about the learning rate, 2e-3.
    """
    found = trained(out)
    wanted = trained(reference)
    assert found.keys() == wanted.keys()
    pairs = [(load(found[arm]), load(wanted[arm])) for arm in found]
    return all(
        np.allclose(a[name], b[name], rtol=0, atol=1e-3)
        for a, b in pairs
        for name in a.keys() | b.keys()
    )


def losses(out: Path) -> dict[str, list[float]]:
    """The training loss of every arm at each evaluation."""
    records = {
        path.parent.name: json.loads(path.read_bytes())
        for path in sorted(out.rglob("arms/*/arm.json"))
    }
    return {
        name: [point["loss"] for point in record["history"]] for name, record in records.items()
    }


def sound(done: Done) -> None:
    assert done.code == 0, done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def alone(tiny, scored, tmp_path_factory) -> Path:
    """An --out whose arms were trained by one worker, undisturbed."""
    return _trained(tiny, scored, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def phased(tiny, tmp_path_factory) -> Path:
    """A recipe whose unrounded arm is the tiny recipe's student, and whose student is rounded in a
    second phase.
    """
    path = tmp_path_factory.mktemp("recipe") / "phased.toml"
    path.write_text(f"unrounded = true\n{tiny.read_text()}{PHASES}")
    return path


@pytest.fixture(scope="module")
def pair(phased, scored, session, tmp_path_factory) -> Path:
    """An --out whose arms were trained by a group of two workers, undisturbed."""
    folder = tmp_path_factory.mktemp("pair")
    return _trained(phased, scored, folder, "--set", "scale.workers=2", **session)


def _trained(tiny: Path, scored: Path, folder: Path, *options: str, **environment: str) -> Path:
    out = folder / "out"
    out.mkdir()
    (out / "stores").symlink_to(scored / "stores")
    done = raykd(folder, "train", tiny, "--out", out, *options, **environment)
    sound(done)
    (folder / "told").write_text(done.err)
    return out


@pytest.fixture(scope="module")
def twice_killed(phased, scored, session, tmp_path_factory) -> Path:
    """An --out whose arms were trained by two workers: in the unrounded arm one was stopped, until
    raykd ended it, and one was killed in the student's second phase.
    """
    folder = tmp_path_factory.mktemp("killed")
    plans = (
        "train:step=25,rank=1,arm=unrounded-0,signal=STOP",
        "train:step=35,rank=1,arm=student-0",
    )
    fault = in_workers(fatal(";".join(plans), folder / "fired"))
    scale = ("--set", "scale.workers=2", "--set", "scale.stall_timeout_s=10")
    out = _trained(phased, scored, folder, *scale, **session, **fault)
    assert all((folder / f"fired.{number}").exists() for number in range(len(plans)))
    return out


def test_a_worker_killed_in_training_changes_no_weight(pair, twice_killed):
    assert trained(twice_killed).keys() == {"control-0", "unrounded-0", "student-0"}
    assert alike(twice_killed, pair)


def test_a_worker_that_stops_is_named_with_its_node_and_replaced(twice_killed):
    """It was waited for without a word, for as long as it was stopped."""
    told = (twice_killed.parent / "told").read_text()
    (line,) = [line for line in told.splitlines() if "has stopped" in line]
    assert re.search(
        r"train +! rank 1 on node \S+, \S+ has stopped: its process says nothing", line
    )
    assert "its group starts again from the newest checkpoint" in line


def test_a_worker_killed_within_a_phase_resumes_in_it(pair, twice_killed):
    """Its scales, how far rounding has faded in, and the phase's best student come back with it."""
    name = "student-0"
    assert any(key.endswith(".scale") for key in load(trained(twice_killed)[name]))
    assert losses(twice_killed)[name] == pytest.approx(losses(pair)[name], rel=1e-4)


def test_two_workers_learn_what_one_does_up_to_the_order_of_sums(alone, pair):
    # a sum of 32 rows in another order differs in the last bits of fp32 (6e-8); 40 steps of AdamW
    # magnify that
    both = losses(pair)
    one = losses(alone)
    assert both["control-0"] == pytest.approx(one["control-0"], rel=1e-4)
    assert both["unrounded-0"] == pytest.approx(one["student-0"], rel=1e-4)
    ours = next(pair.rglob("unrounded-0/weights.safetensors"))
    theirs = next(alone.rglob("student-0/weights.safetensors"))
    for name, value in load_file(ours).items():
        np.testing.assert_allclose(value, load_file(theirs)[name], atol=1e-3, err_msg=name)


def test_a_killed_driver_is_run_again_and_changes_no_weight(tiny, alone, stocked, tmp_path):
    fired = tmp_path / "fired"
    out = stocked("out")
    killed = raykd(
        tmp_path, "train", tiny, "--out", out, **fatal("train:step=25,rank=0,arm=student-0", fired)
    )
    assert killed.code == -9
    assert fired.exists()
    assert trained(out).keys() == {"control-0"}
    assert list(out.rglob("student-0/step-*.safetensors"))
    sound(raykd(tmp_path, "train", tiny, "--out", out))
    assert alike(out, alone)


def test_a_scorer_killed_between_shard_and_record_changes_no_byte_of_the_manifest(
    tiny, scored, session, tmp_path
):
    fired = tmp_path / "fired"
    out = tmp_path / "out"
    fault = in_workers(fatal("score:shard=1,at=before_commit", fired))
    sound(raykd(tmp_path, "score", tiny, "--out", out, **session, **fault))
    assert fired.exists()
    manifests: list[Any] = [list(where.glob("stores/*/_MANIFEST.json")) for where in (out, scored)]
    assert [path.parent.name for path in manifests[0]] == [
        path.parent.name for path in manifests[1]
    ]
    assert manifests[0][0].read_bytes() == manifests[1][0].read_bytes()


def test_a_command_in_a_ray_session_is_terminated_in_two_lines_and_the_rerun_continues(
    tiny, session, tmp_path
):
    out = tmp_path / "out"
    asked = ("score", tiny, "--out", out, "--set", "store.rows_per_shard=64")
    running = start(tmp_path, *asked, **session)
    until(lambda: list(out.glob("stores/*/_commits/*.json")))
    os.kill(running.pid, signal.SIGTERM)
    done = running.wait()
    assert done.code == 143, done.err
    assert done.err.splitlines()[-1] == "raykd: interrupted; the same command continues from here"
    assert "SIGTERM received" not in done.err
    assert not list(out.glob("stores/*/_MANIFEST.json"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("stores/*/data/*.parquet")}
    sound(raykd(tmp_path, *asked, **session))
    assert {path: path.stat().st_mtime_ns for path in before} == before
