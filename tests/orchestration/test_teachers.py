"""A teacher beside the workers: it dies in the middle of a training, and nothing of the result
changes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import texts
from command import in_workers, raykd
from safetensors.numpy import load_file

pytestmark = pytest.mark.ray
OWN = """
[terms.kd]
weight = 0
[source]
share = 1.0
length = 6
passes = 2
ahead = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe whose student learns from its own text alone, so that no store is needed."""
    home = tmp_path_factory.mktemp("served")
    path = texts.recipe(home, texts.tokenizer(home))
    text = (
        path.read_text()
        .replace("[terms.kd]\ntemperature = 1.0\n", "")
        .replace('"vanilla"', '"gkd"\ncontrol = false')
    )
    path.write_text(text + OWN)
    return path


def trained(
    recipe: Path, out: Path, session: dict[str, str], fault: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arm.json, weights) of the student, trained by two workers on the shared cluster."""
    job = in_workers(fault) if fault else {}
    done = raykd(out, "train", recipe, "--out", out, "--set", "scale.workers=2", **session, **job)
    assert done.code == 0, done.err
    (arm,) = out.glob("text-*/arms/student-0")
    return json.loads((arm / "arm.json").read_bytes()), load_file(arm / "weights.safetensors")


def test_a_teacher_that_dies_costs_time_alone(recipe, session, tmp_path):
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
    fault = {"RAYKD_FAULT": "teach:call=9", "RAYKD_FAULT_FIRED": str(tmp_path / "fired")}
    undisturbed, wanted = trained(recipe, tmp_path / "alone", session, {})
    killed, found = trained(recipe, tmp_path / "killed", session, fault)
    assert (tmp_path / "fired").exists()
    assert killed["steps"] == undisturbed["steps"] == 30
    assert (
        [h["lag"] for h in killed["history"]]
        == [h["lag"] for h in undisturbed["history"]]
        == [2, 2, 2]
    )
    assert (
        max(abs(found[name] - wanted[name]).max() for name in wanted) < 1e-3
    )  # mostly none: see test_recovery
