"""A student in parts on two workers learns what one process does, and goes on from a checkpoint of
any number of workers and any `shard`.

Two processes sum the same numbers in another order: float32 (2^-24 relative a sum) over 12 steps of
Adam. Losses may differ by 1e-5 relative, weights by 1e-5, which are ten times what was seen. The
keys' bias is left out, whose gradient is mere rounding.
"""

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
import torch.distributed as dist
from child import start, wait
from random_rows import rows_for
from safetensors.torch import load_file, save_file
from torch import nn

from raykd import techniques
from raykd.errors import InfraError, RecipeError
from raykd.models import compiled
from raykd.models.adapter import Adapter
from raykd.models.compiled import compile_student
from raykd.models.recompute import recompute_blocks
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.precision import Precision
from raykd.recipe.tables import Optim, Phase, TermSpec
from raykd.stages.load import resolve
from raykd.training import checkpoints
from raykd.training.arm import ONE_PROCESS, Arm, World
from raykd.training.checkpoints import Checkpoints, Extent, Part
from raykd.training.loop import train
from raykd.training.pieces import Sharding, workers_of_parts
from raykd.training.state import State

techniques.load_terms()
OPTIM = Optim(steps=12, batch=7, evaluate_every=4, clip=0.5)
ARM = Arm(
    "student",
    0,
    {
        "ce": TermSpec(weight=0.5),
        "kd": TermSpec(weight=0.5),
        "hint": TermSpec.model_validate({"weight": 0.1, "pairs": [["blocks.0", "blocks.1"]]}),
        "value": TermSpec(weight=0.1, since=0.5),
        "future_valence": TermSpec(weight=0.1),
    },
)
CHOSEN = replace(ARM, select="accuracy", phases=(Phase(until=0.5), Phase(until=1.0)))
AVERAGED = OPTIM.model_copy(update={"ema": 0.5})  # of the arms that choose
SAVED: dict[str, Any] = {"checkpoint_every": 4}
BF16 = Precision.model_validate({"student": "bf16"})
# shard, the nodes of two workers, and what else a training is given
CASES: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "hybrid": ("hybrid", "aa", {}),
    "copies": ("hybrid", "ab", {}),
    "micro": ("full", "aa", {"micro": 3, "recompute": True}),
    "bf16": ("full", "aa", {"precision": BF16}),
    "compiled": ("full", "aa", {"micro": 3, "recompute": True, "compile": True}),
    "compiled copies": (None, "aa", {"compile": True}),
    "chosen": ("full", "aa", {"arm": CHOSEN}),
    "full from one": ("full", "aa", {**SAVED, "begun": "one", "arm": CHOSEN}),
    "hybrid from hybrid": ("hybrid", "aa", {**SAVED, "begun": "hybrid"}),
    "chosen from chosen": ("full", "aa", {**SAVED, "begun": "chosen", "arm": CHOSEN}),
    "copies from chosen": ("hybrid", "ab", {**SAVED, "begun": "chosen", "arm": CHOSEN}),
    "none from chosen": (None, "aa", {**SAVED, "begun": "chosen", "arm": CHOSEN}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def student(seed: int = 1, *, recompute: bool = False, compile: bool = False) -> Adapter:
    torch.manual_seed(seed)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=8, layers=2)
    if compile:
        compiled.BACKEND = "eager"  # a graph that is recorded, and run as it is
        compile_student(module, print)
    if recompute:
        recompute_blocks(module)
    return Adapter(module, want=frozenset({"hidden.blocks.0"}))


def judged(model: nn.Module) -> dict[str, float]:
    """A validation that reads the weights, and is best at the beginning of a phase."""
    size = sum(value.detach().abs().sum().item() for value in model.parameters())
    return {"val_accuracy": -size, "val_size": size}


def trained(
    shard: str | None,
    world: World,
    *,
    arm: Arm = ARM,
    folder: Path | None = None,
    recompute: bool = False,
    compile: bool = False,
    **keywords: Any,
) -> State:
    again = partial(student, 2 + world.rank, recompute=recompute, compile=compile)
    sharding = Sharding(shard, again) if shard else None  # pyright: ignore[reportArgumentType]
    begins = student(recompute=recompute, compile=compile)
    return train(
        arm,
        AVERAGED if arm.select else OPTIM,
        begins,
        rows_for(arm),
        judged,
        world=world,
        sharding=sharding,
        checkpoints=Checkpoints(folder) if folder else None,
        **keywords,
    )


def bytes_of_state(state: State) -> int:
    """Bytes of parameters and optimiser on this worker."""
    values = [*state.learner.parameters()]
    values += [v for slots in state.optimizer.state.values() for v in slots.values()]
    locals_ = [v.to_local() if hasattr(v, "to_local") else v for v in values]
    return sum(value.nbytes for value in locals_)


def work(rank: int, meeting: Path, out: Path, names: list[str]) -> None:
    """One worker of two: a training for each name."""
    from torch import _dynamo

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name in names:
        shard, nodes, keywords = CASES[name]
        keywords = dict(keywords)
        begun = keywords.pop("begun", None)
        folder = out / "checkpoints" / name if begun else None
        reports: list[int] = []
        state = trained(
            shard,
            World(rank, 2, nodes[rank]),
            folder=folder,
            report=lambda step, _, reports=reports: reports.append(step),
            **keywords,
        )
        if "compile" in keywords:
            assert _dynamo.utils.counters["stats"].pop("unique_graphs") > 0
        save_file(dict(state.student.module.state_dict()), out / f"{name}-{rank}.safetensors")
        told = {"history": state.history, "bytes": bytes_of_state(state), "reports": reports}
        (out / f"{name}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def killed(rank: int, meeting: Path, folder: Path, name: str) -> None:
    """One worker of two, of which the second is killed after step 10."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    shard, nodes, keywords = CASES[name]
    trained(shard, World(rank, 2, nodes[rank]), folder=folder, **SAVED, **keywords)


def dead(name: str, folder: Path, out: Path) -> None:
    fault = {"RAYKD_FAULT": "train:step=10,rank=1", "RAYKD_FAULT_FIRED": str(out / f"fired {name}")}
    meeting = out / f"meeting {name}"
    workers = [start(killed, rank, meeting, folder, name, **fault) for rank in range(2)]
    codes = wait(workers)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """Where two workers have left all of the trainings."""
    out = tmp_path_factory.mktemp("shards")
    begun = {name: out / "begun" / name for name in ("one", "hybrid", "chosen")}
    for name in ("hybrid", "chosen"):
        dead(name, begun[name], out)
    begin_alone(begun["one"])
    for name, (_, _, keywords) in CASES.items():
        if "begun" in keywords:
            shutil.copytree(begun[keywords["begun"]], out / "checkpoints" / name)
    workers = [start(work, rank, out / "meeting", out, list(CASES)) for rank in range(2)]
    assert wait(workers) == [0, 0]
    return out


def begin_alone(folder: Path) -> None:
    def die(step: int, _: dict[str, Any]) -> None:
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(None, ONE_PROCESS, arm=CHOSEN, folder=folder, report=die, **SAVED)


@pytest.fixture(scope="module")
def alone() -> Callable[[str], State]:
    """The same training in one process."""
    known: dict[str, State] = {}

    def of(name: str) -> State:
        _, _, keywords = CASES[name]
        found = {k: v for k, v in keywords.items() if k in ("arm", "precision")}
        key = repr(found)
        known[key] = known.get(key) or trained(None, ONE_PROCESS, **found)
        return known[key]

    return of


def told(out: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{name}-{rank}.json").read_text())


def weights(out: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"{name}-{rank}.safetensors")


def assert_near(history: list[Any], values: dict[str, torch.Tensor], whole: State) -> None:
    for one, two in zip(history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["terms"] == pytest.approx(two["terms"], rel=1e-5, abs=1e-7)
        assert one["val_size"] == pytest.approx(two["val_size"], rel=1e-5)
    for name, value in whole.student.module.state_dict().items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(values[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_two_workers_in_parts_learn_what_one_process_does(name, ended, alone):
    assert_near(told(ended, name)["history"], weights(ended, name), alone(name))
    assert told(ended, name)["history"] == told(ended, name, 1)["history"]
    both = weights(ended, name), weights(ended, name, 1)
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_two_workers_in_parts_learn_in_bf16_what_one_process_does_up_to_its_rounding(ended, alone):
    """A bf16 has 8 bits, so a sum in another order may round to its neighbour, 4e-3 away."""
    for one, two in zip(told(ended, "bf16")["history"], alone("bf16").history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=4e-3)
    assert told(ended, "bf16")["history"] != told(ended, "hybrid")["history"]


@pytest.mark.parametrize("name", ["hybrid", "chosen"])
def test_a_training_in_parts_that_was_killed_ends_with_the_same_bits(name, ended):
    resumed = f"{name} from {name}"
    assert told(ended, resumed)["reports"] == [12]
    assert told(ended, resumed)["history"] == told(ended, name)["history"]
    found, whole = (weights(ended, key) for key in (resumed, name))
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["full from one", "copies from chosen", "none from chosen"])
def test_two_workers_go_on_from_a_state_of_another_shard(name, ended):
    assert told(ended, name)["reports"] == [12]


def test_one_worker_goes_on_from_the_parts_of_two(ended, alone, tmp_path):
    shutil.copytree(ended / "begun" / "chosen", tmp_path, dirs_exist_ok=True)
    reports: list[int] = []
    state = trained(
        None,
        ONE_PROCESS,
        arm=CHOSEN,
        folder=tmp_path,
        report=lambda step, _: reports.append(step),
        **SAVED,
    )
    assert reports == [12]
    assert_near(state.history, state.student.module.state_dict(), alone("chosen"))


def test_a_damaged_part_gives_way_to_the_state_before_it(ended, alone, tmp_path, capsys):
    shutil.copytree(ended / "begun" / "hybrid", tmp_path, dirs_exist_ok=True)
    assert (
        sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 2 + [".safetensors"] * 4
    )
    kept = Checkpoints(tmp_path)
    assert [step for step, _ in kept._found()] == [8, 4]
    path = max(tmp_path.glob("part-00000008-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    reports: list[int] = []
    state = trained(
        None, ONE_PROCESS, folder=tmp_path, report=lambda n, _: reports.append(n), **SAVED
    )
    assert reports == [8, 12]
    assert "is damaged" in capsys.readouterr().err
    assert_near(state.history, state.student.module.state_dict(), alone("hybrid"))
    kept.clear()
    assert not list(tmp_path.iterdir())


def test_a_state_in_parts_is_written_on_threads_and_is_none_before_all_parts_are_there(tmp_path):
    values = torch.arange(10.0).view(5, 2)
    writers = [Checkpoints(tmp_path) for _ in range(2)]
    token = "attempt"
    first = {"value": Extent(0, 3)}
    writers[0].save(4, {"value": values[:3]}, {"told": 1}, part=Part(0, 2, token), extents=first)
    assert writers[0].thread is not None
    assert writers[0].thread.is_alive()  # and this one goes on, with a step
    assert writers[0].newest() is None
    second = {"value": Extent(3, 5)}
    writers[1].save(4, {"value": values[3:]}, {}, part=Part(1, 2, token), extents=second)
    for writer in writers:
        writer.wait()
    found = writers[1].newest()
    assert found is not None
    assert found.meta == {"told": 1}
    assert torch.equal(found.tensors["value"], values)


def test_a_worker_that_fails_does_not_wait_long_for_the_parts_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LATE_S", 0)
    kept = Checkpoints(tmp_path)
    value = {"value": torch.ones(1)}
    with suppress(ZeroDivisionError), kept.writing():
        kept.save(4, value, {}, part=Part(0, 2, "attempt"))
        raise ZeroDivisionError
    assert kept.newest() is None
    kept.save(5, value, {}, part=Part(0, 2, "attempt"))
    with pytest.raises(InfraError, match="1 of 2 parts of the checkpoint of step 5 are there"):
        kept.wait()


def test_a_worker_has_half_of_the_state_where_two_have_all(ended, alone):
    whole = bytes_of_state(alone("hybrid"))
    for name in ("micro", "hybrid"):
        assert [told(ended, name, rank)["bytes"] / whole <= 0.55 for rank in range(2)] == [True] * 2
    assert told(ended, "copies")["bytes"] == whole


ROUNDED = {"phases": [{"until": 1.0, "quant": {}}], "scale": {"workers": 2}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"scale": {"workers": 1}}, "scale.workers = 1 has all of it"),
        (ROUNDED, "its scales need whole weights"),
    ],
)
def test_a_student_that_cannot_lie_in_parts_is_refused(tables, words, tmp_path):
    teacher = by_hand.teacher(tmp_path / "teacher.safetensors")
    scale = {"shard": "full", **tables["scale"]}
    with pytest.raises(RecipeError) as caught:
        resolve({"technique": "vanilla", "teacher": teacher, **tables, "scale": scale})
    assert [p.key for p in caught.value.problems] == ["scale.shard"]
    assert words in caught.value.problems[0].message


class Single(SeriesEncoder):
    """With a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__(channels=3, classes=4, steps=8, width=8)
        self.scale = nn.Parameter(torch.ones(()))


class Shared(SeriesEncoder):
    """Whose blocks share a weight."""

    def __init__(self) -> None:
        super().__init__(channels=3, classes=4, steps=8, width=8, layers=2)
        self.blocks[1].norm1.weight = self.blocks[0].norm1.weight


class Beside(SeriesEncoder):
    """Which reads a block's weight without calling the block."""

    def forward(self, inputs: torch.Tensor, past: Any = None) -> Any:
        first = next(self.blocks[0].parameters())
        answer = super().forward(inputs, past)
        return {"logits": answer["logits"] + first.sum()}


@pytest.mark.parametrize(
    ("make", "words"),
    [(Single, "scale is a single number"), (Shared, "several blocks"), (Beside, "fails in parts")],
)
def test_a_model_that_cannot_lie_in_parts_is_refused_by_what_it_does(make, words):
    from raykd.training.sharding import check_parts

    kinds = {"channels": 3, "classes": 4, "steps": 8, "width": 8}
    inputs = torch.randn(2, 8, 3)
    mask = torch.ones(2, 8, dtype=torch.bool)
    check_parts(SeriesEncoder(**kinds, layers=2), inputs, mask)
    module = Beside(**kinds) if make is Beside else make()
    with pytest.raises(RecipeError, match=words) as caught:
        check_parts(module, inputs, mask)
    assert [p.key for p in caught.value.problems] == ["scale.shard"]
    assert not dist.is_initialized()


class Apart(World):
    """Three workers on two nodes."""

    def told(self, text: str, device: torch.device) -> list[str]:
        return ["a", "a", "b"]


def test_copies_on_nodes_of_unequal_numbers_of_workers_are_refused():
    cpu = torch.device("cpu")
    assert workers_of_parts("full", Apart(0, 3), cpu) == [[0, 1, 2]]
    with pytest.raises(RecipeError, match=r"scale\.shard: .*a has 2, b has 1"):
        workers_of_parts("hybrid", Apart(0, 3), cpu)
