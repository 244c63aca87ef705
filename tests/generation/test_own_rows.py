"""Laws of a training on text that the student writes: how old it may be, resumed, shared out; then
that it learns.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from child import start, wait
from safetensors.torch import load_file, save_file

from raykd import techniques
from raykd.generation.own_rows import LiveTeacher, TextShape
from raykd.generation.sampling import FrozenTeacher
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.recipe.source import Source
from raykd.recipe.tables import Optim, Phase, TermSpec
from raykd.training.arm import Arm, World
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train
from raykd.training.phases import prepare
from raykd.training.state import State

techniques.load_terms()
VOCAB = 13
STEPS = 12
ROWS = 40
OPTIM = Optim(steps=24, batch=12, learning_rate=1e-2, evaluate_every=6)
SIZES = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "inner": 32}


def teacher() -> Llama:
    torch.manual_seed(5)
    module = Llama(classes=VOCAB, steps=STEPS, tied=False, **SIZES)
    module.lm_head.weight.data.mul_(60)
    return module.eval().requires_grad_(False)


def rows() -> DeviceRows:
    """Rows of random tokens with the teacher's answers, each a document."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (ROWS, STEPS + 1), generator=draw)
    inputs = torch.stack([tokens[:, :-1], torch.arange(STEPS).expand(ROWS, -1)], -1)
    mask = torch.ones(ROWS, STEPS, dtype=torch.bool)
    logits = teacher()(inputs)["logits"]
    return DeviceRows(
        torch.arange(ROWS), inputs, mask, tokens[:, 1:], None, {"logits": logits}, mask
    )


def arm(terms: dict, source: Source, phases: tuple[Phase, ...] = ()) -> Arm:
    return Arm("student", 3, {n: TermSpec(**s) for n, s in terms.items()}, None, phases, source)


ARMS = {
    "gkd": arm({"kd": {"temperature": 1.0}, "gkd": {}}, Source(length=5, passes=2, ahead=1)),
    "minillm": arm({"minillm": {}}, Source(length=5, share=1.0, mixed=0.2, passes=3)),
    "ghost": arm({"ghost": {}, "distilspec": {}}, Source(kind="drafts", length=4, share=1.0)),
    "fading": arm(
        {"minillm": {}},
        Source(length=5, share=1.0),
        (
            Phase(until=0.25),
            Phase.model_validate({"until": 1.0, "blend": 0.9, "quant": {"weights": "ternary"}}),
        ),
    ),
    "late": arm({"kd": {"temperature": 1.0}, "gkd": {"since": 0.6}}, Source(length=5)),
    "rounded": arm(
        {"kd": {"temperature": 1.0}, "distilspec": {}},
        Source(length=5),
        (
            Phase(until=0.4),
            Phase.model_validate({"until": 1.0, "quant": {"activations": "int8_token"}}),
        ),
    ),
}
EVERY = pytest.mark.parametrize("name", ARMS)


def run(name: str, *, world: World | None = None, optim: Optim = OPTIM, **options) -> State:
    found = ARMS[name]
    torch.manual_seed(1)
    module = Llama(classes=VOCAB, steps=STEPS, **SIZES)
    prepare(module, found.phases)
    live = LiveTeacher(FrozenTeacher(teacher()), TextShape(STEPS, 0, VOCAB))
    return train(
        found,
        optim,
        Adapter(module),
        rows(),
        lambda _: {},
        world=world or World(),
        live=live,
        **options,
    )


def weights(state: State) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in state.learner.student.module.state_dict().items()}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@EVERY
def test_own_text_is_never_older_than_its_source_says(name):
    source = ARMS[name].source
    history = run(name).history
    assert source is not None
    lags = [h["lag"] for h in history if "lag" in h]
    assert lags
    assert max(lags) == source.ahead + source.passes - 1 <= source.limit


def test_no_text_is_drawn_before_a_term_reads_it():
    history = run("late").history
    assert ["lag" in h for h in history] == [False, False, True, True]
    assert [h["terms"]["gkd"] > 0 for h in history] == [False, False, True, True]


@EVERY
def test_a_training_resumed_at_a_report_ends_with_the_same_bits(name, tmp_path):
    class Killed(Exception):
        pass

    def die(step: int, _) -> None:
        if step == 18:
            raise Killed

    kept = Checkpoints(tmp_path)
    with pytest.raises(Killed):
        run(name, checkpoints=kept, checkpoint_every=6, report=die)
    told: list[int] = []
    resumed = run(
        name, checkpoints=kept, checkpoint_every=6, report=lambda step, _: told.append(step)
    )
    alone = run(name)
    assert told[0] in (18, 24)
    assert resumed.history == alone.history
    assert apart(weights(resumed), weights(alone)) == 0


def share(rank: int, size: int, meeting: Path, out: Path, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    optim = OPTIM.model_copy(update={"steps": 12})
    save_file(
        weights(run(name, world=World(rank, size), optim=optim)), out / f"{name}-{rank}.safetensors"
    )
    dist.destroy_process_group()


@EVERY
def test_two_workers_write_and_learn_as_one(name, tmp_path):
    """Two processes take the same sums in another order, which float32 rounds otherwise.

    A gradient sums n = rows x steps terms, each rounded to 2^-24 of its size: sqrt(n) 2^-24 of a
    usual gradient. Adam divides it by its own size. The smallest of N gradients is about an N-th of
    a usual one, so that its weight moves otherwise by N sqrt(n) 2^-24 learning rates a step, and by
    sqrt(S) times that in S steps. A row lost or read twice moves weights by the learning rate, 150
    times as much.
    """
    optim = OPTIM.model_copy(update={"steps": 12})
    workers = [start(share, rank, 2, tmp_path / "meeting", tmp_path, name) for rank in range(2)]
    assert wait(workers) == [0, 0]
    ranks = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert apart(*ranks) == 0
    alone = weights(run(name, optim=optim))
    count = sum(value.numel() for value in alone.values())
    summed = optim.batch * STEPS * optim.steps
    bound = optim.learning_rate * count * summed**0.5 * 2**-24
    assert bound < optim.learning_rate / 100
    assert apart(ranks[0], alone) < bound


def test_what_the_student_writes_comes_to_be_the_teachers():
    """KL(q || p) on the student's own text falls below half within 150 steps of gkd alone."""
    found = replace(
        ARMS["gkd"], terms={"gkd": TermSpec(beta=1.0)}, source=Source(length=8, share=1.0)
    )
    torch.manual_seed(1)
    student = Adapter(Llama(classes=VOCAB, steps=STEPS, **SIZES))
    optim = Optim(steps=150, batch=24, learning_rate=1e-2, evaluate_every=10)
    live = LiveTeacher(FrozenTeacher(teacher()), TextShape(STEPS, 0, VOCAB))
    history = train(found, optim, student, rows(), lambda _: {}, live=live).history
    first, last = (history[i]["terms"]["gkd"] for i in (0, -1))
    assert last < first / 2
