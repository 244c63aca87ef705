"""When text is drawn and used, and that students learn from what they write: small runs that must
reach a number.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raykd import techniques
from raykd.errors import DataError, RecipeError
from raykd.generation.own_rows import OwnRows, TextShape, write_rows
from raykd.generation.sampling import FrozenTeacher, on_policy
from raykd.generation.schedule import Schedule
from raykd.losses.objective import Objective
from raykd.models.llama import Llama
from raykd.recipe.quant import Quant
from raykd.recipe.source import Source
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.stages.load import resolve
from raykd.training import phases
from raykd.training.arm import World

techniques.load_terms()
V = 16
T = 24
ROOM = 36
ROWS = 32
SCHEDULES = st.builds(
    Schedule,
    passes=st.integers(1, 7),
    ahead=st.integers(0, 9),
    every=st.integers(1, 23),
    begins=st.lists(st.integers(1, 60), max_size=3).map(lambda more: (0, *sorted(more))),
)


@given(SCHEDULES)
def test_every_step_has_a_group_that_was_drawn_in_its_own_interval_and_is_young(schedule):
    for step in range(80):
        slot = schedule.slot(step)
        begin = schedule.begin(step)
        assert begin <= slot.drawn <= slot.first <= step < slot.first + schedule.passes
        assert step - slot.drawn <= schedule.ahead + schedule.passes - 1
        assert slot.drawn == begin or slot.first - slot.drawn == schedule.ahead
        assert not any(begin < b <= step for b in (*range(0, 80, schedule.every), *schedule.begins))


@given(SCHEDULES)
def test_each_group_is_drawn_once_and_before_it_is_used(schedule):
    drawn = [(group, step) for step in range(80) for group in schedule.due(step)]
    assert len({group for group, _ in drawn}) == len(drawn)
    assert all(schedule.slot(group).drawn == step for group, step in drawn)
    assert {schedule.slot(step).first for step in range(80)} <= {group for group, _ in drawn}


@given(SCHEDULES)
def test_a_group_serves_its_number_of_steps_unless_an_interval_ends(schedule):
    for group in {schedule.slot(step).first for step in range(60)}:
        steps = [s for s in range(90) if schedule.slot(s).first == group]
        assert steps == list(range(group, group + len(steps)))
        end = group + len(steps)
        assert len(steps) == schedule.passes or schedule.begin(end) == end


def test_text_is_new_at_every_step_unless_asked_otherwise():
    schedule = Schedule(every=10)
    assert [schedule.slot(step).drawn for step in range(25)] == list(range(25))


@pytest.mark.parametrize(("share", "rows"), [(1.0, 8), (0.5, 4), (0.01, 1), (0.99, 7)])
def test_a_share_below_one_leaves_the_data_a_row(share, rows):
    assert Source(share=share).rows(8) == rows


@pytest.fixture(scope="module")
def language() -> Callable[[int, int], Tensor]:
    """Texts of a random second-order Markov chain: (count, seed) -> (count, T + 1, 2)."""
    table = (2.5 * torch.randn(V, V, V, generator=torch.Generator().manual_seed(0))).softmax(-1)

    def texts(count: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        found = [torch.randint(V, (count,), generator=draw) for _ in range(2)]
        while len(found) <= T:
            found.append(torch.multinomial(table[found[-2], found[-1]], 1, generator=draw)[:, 0])
        return torch.stack([torch.stack(found, 1), torch.arange(T + 1).expand(count, -1)], -1)

    return texts


@pytest.fixture(scope="module")
def rows(language) -> Callable[[int], Batch]:
    def batch(step: int) -> Batch:
        text = language(ROWS, 10_000 + step)
        return Batch(
            torch.arange(ROWS), text[:, :-1], torch.ones(ROWS, T, dtype=torch.bool), text[:, 1:, 0]
        )

    return batch


def fitted(
    language: Callable[[int, int], Tensor], seed: int, steps: int, rate: float, **shape: int
) -> Llama:
    """A model after so many steps of plain cross-entropy."""
    torch.manual_seed(seed)
    module = Llama(classes=V, steps=ROOM, **shape)
    optim = torch.optim.AdamW(module.parameters(), rate)
    for step in range(steps):
        text = language(ROWS, step)
        loss = F.cross_entropy(
            module(text[:, :-1])["logits"].flatten(0, 1), text[:, 1:, 0].flatten()
        )
        optim.zero_grad()
        loss.backward()
        optim.step()
    return module


@pytest.fixture(scope="module")
def teacher(language) -> FrozenTeacher:
    return FrozenTeacher(fitted(language, 0, 300, 5e-3, width=48, layers=2, heads=4, inner=96))


@pytest.fixture(scope="module")
def begun(language) -> dict[str, Tensor]:
    return fitted(
        language, 1, 150, 1e-2, width=16, layers=1, heads=2, kv_heads=1, inner=32
    ).state_dict()


def student_of(weights: dict[str, Tensor]) -> Llama:
    module = Llama(classes=V, steps=ROOM, width=16, layers=1, heads=2, kv_heads=1, inner=32)
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("kind", ["on_policy", "drafts"])
def test_workers_draw_the_rows_of_one_global_batch(kind, rows, begun, teacher):
    source = Source(kind=kind, length=6, mixed=0.0 if kind == "drafts" else 0.2)
    student = student_of(begun)
    every = rows(0)

    def drawn(share: slice) -> Batch:
        mine = replace(
            every, row_id=every.row_id[share], inputs=every.inputs[share], mask=every.mask[share]
        )
        return write_rows(source, TextShape(ROOM), 7, 3, student, teacher, mine, share=share)()

    whole = drawn(slice(0, ROWS))
    parts = [drawn(World(rank, 3).share(ROWS)) for rank in range(3)]
    for name in ("row_id", "inputs", "label", "mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert not torch.equal(
        write_rows(
            source, TextShape(ROOM), 8, 3, student, teacher, every, share=slice(0, ROWS)
        )().label,
        whole.label,
    )


def test_a_source_that_leaves_no_prompt_is_refused(rows, begun, teacher):
    with pytest.raises(DataError, match=r"source.length = 37 leaves no position.*give at most 36"):
        write_rows(
            Source(length=37),
            TextShape(ROOM),
            0,
            0,
            student_of(begun),
            teacher,
            rows(0),
            share=slice(0, ROWS),
        )


def trained(
    module: nn.Module,
    teacher: FrozenTeacher,
    rows: Callable[[int], Batch],
    source: Source,
    terms: dict[str, Any],
    steps: int,
    optim: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> tuple[torch.optim.Optimizer, list[Batch]]:
    """A plain loop over steps [first, steps), reports every 10."""
    objective = Objective({name: TermSpec(**settings) for name, settings in terms.items()})
    optim = optim or torch.optim.AdamW(module.parameters(), 5e-3)

    def draw(group: int) -> Callable[[], Batch]:
        return write_rows(
            source, TextShape(ROOM), group, 0, module, teacher, rows(group), share=slice(0, ROWS)
        )

    own = OwnRows(Schedule(source.passes, source.ahead, every=10), draw)
    used = []
    for step in range(first, steps):
        batch = own(step)
        used.append(batch)
        sums, counts = objective(Signals(module(batch.inputs)["logits"], batch.mask), batch)
        optim.zero_grad()
        objective.total(sums, counts).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optim.step()
    return optim, used


@pytest.mark.parametrize(("passes", "ahead"), [(1, 0), (4, 0), (2, 3)])
def test_a_training_resumed_at_a_report_ends_as_one_that_was_not(
    passes, ahead, rows, begun, teacher
):
    source = Source(length=6, share=1.0, passes=passes, ahead=ahead)
    terms = {"minillm": {}}
    whole = student_of(begun)
    _, used = trained(whole, teacher, rows, source, terms, 20)
    parted = student_of(begun)
    optim, _ = trained(parted, teacher, rows, source, terms, 10)
    again = student_of(parted.state_dict())
    fresh = torch.optim.AdamW(again.parameters(), 5e-3)
    fresh.load_state_dict(optim.state_dict())
    _, rest = trained(again, teacher, rows, source, terms, 20, fresh, first=10)
    for one, two in zip(used[10:], rest, strict=True):
        assert torch.equal(one.label, two.label)
        assert one.rollout
        assert two.rollout
        assert one.rollout.lag == two.rollout.lag
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    assert max(b.rollout.lag for b in used if b.rollout) == ahead + passes - 1


def measured(
    module: nn.Module, teacher: FrozenTeacher, language: Callable[[int, int], Tensor]
) -> dict[str, float]:
    """On text that the student writes after 256 prompts:

    KL(q || p), and the share of drafts that p accepts.
    """
    numbers = torch.rand(256, 12, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    batch = on_policy(
        module, teacher, language(256, 9999)[:, :6], row_id=torch.arange(256), uniforms=numbers
    )()
    assert batch.teacher
    with torch.no_grad():
        q = module(batch.inputs)["logits"].log_softmax(-1)[batch.mask]
    p = batch.teacher.logits.log_softmax(-1)[batch.mask]
    return {
        "reverse": (q.exp() * (q - p)).sum(-1).mean().item(),
        "accepted": torch.minimum(p, q).exp().sum(-1).mean().item(),
    }


# Source, terms, what is measured, and how much it must change in 100 steps: half of what was seen.
RUNS = {
    "gkd": (Source(length=12, share=1.0), {"gkd": {}}, "reverse", -0.14),
    "minillm": (
        Source(length=12, share=1.0, mixed=0.2, passes=4),
        {"minillm": {}},
        "reverse",
        -0.09,
    ),
    "distilspec": (Source(length=12, share=1.0), {"distilspec": {}}, "accepted", 0.07),
    "qat_speculative": (Source(length=12, share=1.0), {"distilspec": {}}, "accepted", 0.06),
    "ghost": (Source(kind="drafts", length=6, share=1.0), {"ghost": {}}, "accepted", 0.02),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_student_learns_from_what_it_writes(name, language, rows, begun, teacher):
    source, terms = RUNS[name][:2]
    figure, change = RUNS[name][2:]
    student = student_of(begun)
    if name == "qat_speculative":
        phases.round_as(student, Quant(weights="int8", activations="int8_token"))
    before = measured(student, teacher, language)[figure]
    trained(student, teacher, rows, source, terms, 100)
    after = measured(student, teacher, language)[figure]
    print(f"{name}: {figure} {before:.4f} -> {after:.4f}")
    assert (after - before) / change > 1


LINES = {
    "source.mixed": ({"technique": "ghost", "source": {"mixed": 0.2}}, "no effect on drafts"),
    "source.limit": (
        {"technique": "gkd", "source": {"passes": 9, "ahead": 9}},
        "17 steps after it was drawn, above limit",
    ),
    "source.share": (
        {"technique": "gkd", "source": {"share": 1.0}},
        "leaves no row of the data to the terms kd",
    ),
    "source.share below 1": (
        {"technique": "ghost", "source": {"share": 0.5}},
        "leaves rows to the data that no term",
    ),
    "source without a term": (
        {"technique": "vanilla", "source": {}},
        "no term reads what the student writes",
    ),
    "terms without a source": (
        {"technique": "vanilla", "terms": {"gkd": {}}},
        "source: missing, but the terms gkd",
    ),
    "no teacher": ({"technique": "ghost"}, "teacher: missing, but it scores"),
    "no term at first": (
        {"technique": "ghost", "terms": {"ghost": {"since": 0.6}, "distilspec": {"since": 0.6}}},
        "source.share: 1 leaves steps in which no term counts",
    ),
    "no term between": (
        {
            "technique": "gkd",
            "source": {"share": 0.5},
            "terms": {"ce": {"until": 0.2}, "kd": {"until": 0.2}, "gkd": {"since": 0.3}},
        },
        "terms: at some steps no term counts",
    ),
    "weights of no row": (
        {"technique": "ghost", "weighting": {}},
        "weighting: weighs rows of the data, and source.share = 1 leaves none",
    ),
    "a searched share": (
        {"technique": "gkd", "search": {"source.share": {"choice": [1.0]}}},
        "leaves no row of the data",
    ),
    "too few rows": (
        {"technique": "gkd", "source": {"share": 0.01}, "scale": {"workers": 4}},
        "cannot share with as many",
    ),
    "nothing to keep": (
        {"technique": "gkd", "source": {"keep": True}},
        'nothing to write down: kind = "on_policy" tests no drafts',
    ),
    "a log without replay": (
        {"technique": "ghost", "source": {"log": "x"}},
        'is not read by kind = "drafts"',
    ),
    "replay without a log": (
        {"technique": "ghost", "source": {"kind": "replay"}},
        "names the log that is read",
    ),
    "a log elsewhere": (
        {"technique": "ghost", "source": {"kind": "replay", "log": "gs://bucket/x"}},
        "is not a folder",
    ),
    "a log that is read otherwise": (
        {"technique": "ghost", "source": {"kind": "replay", "log": "x", "passes": 4}},
        'passes: no effect when source.kind = "replay"',
    ),
    "misspelt": ({"technique": "gkd", "source": {"lenght": 3}}, "Did you mean length"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_source_that_can_not_be_is_said(name, tmp_path):
    raw, words = LINES[name]
    if name != "no teacher":
        (tmp_path / "teacher.safetensors").touch()
        raw = raw | {"teacher": {"weights": str(tmp_path / "teacher.safetensors")}}
    if name != "rows of series":
        (tmp_path / "tokenizer.json").touch()
        raw = raw | {"data": {"tokenizer": str(tmp_path / "tokenizer.json")}}
    if raw.get("source", {}).get("log") == "x":
        (tmp_path / "_MANIFEST.json").touch()
        raw = raw | {"source": raw["source"] | {"log": str(tmp_path)}}
    with pytest.raises(RecipeError, match=words) as caught:
        resolve(raw)
    assert len(caught.value.problems) == 1
