"""A teacher beside the workers: it dies in the middle of a training, and nothing of the result
changes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import texts
import torch
from command import in_workers, raykd
from safetensors.numpy import load_file

from raykd.generation.sampling import FrozenTeacher
from raykd.models import adapter
from raykd.models.llama import Llama
from raykd.orchestration.teachers import ServedTeacher, TeacherActor

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


def test_a_served_teachers_large_head_is_sent_once(cluster):
    import ray

    def llama() -> Llama:
        torch.manual_seed(0)
        return Llama(classes=9, steps=6, width=16, layers=1, heads=2, kv_heads=1, inner=24).eval()

    class Actor(TeacherActor):
        def __init__(self, many: int):
            adapter.MANY = many
            self.device = torch.device("cpu")
            self.calls = 0
            self.teacher = FrozenTeacher(llama())
            self.heads = 0

        def head(self) -> Any:
            self.heads += 1
            return super().head()

        def asked(self) -> int:
            return self.heads

    inputs = torch.stack([torch.arange(6) % 9, torch.arange(6)], -1).int()[None]
    expected = llama()(inputs)["logits"]
    for many, has_head in ((8, True), (9, False)):
        name = f"teacher-of-{many}"
        actor: Any = ray.remote(num_cpus=0)(Actor).options(name=name).remote(many)
        served = ServedTeacher(name, most=2, wait_s=60)
        for answer in [served.ask(inputs), served.ask(inputs)]:
            said = answer()
            assert (said.headed is not None) == has_head
            torch.testing.assert_close(said.logits, expected)
        assert ray.get(actor.asked.remote(), timeout=60) == 1
        ray.kill(actor)
