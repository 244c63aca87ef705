"""Drafts that are kept and read again: the log says what was drafted live, whoever wrote it, and
damage is refused.
"""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import texts
import torch
from torch import Tensor

from raykd import techniques
from raykd.errors import DataError, RecipeError, StoreError
from raykd.files.atomic import read_json, to_json
from raykd.files.digests import digest_of
from raykd.generation.draft_log import DraftLog, DraftLogSpec, draft_log_spec
from raykd.generation.own_rows import OwnRows, TextShape, replay_rows, write_rows
from raykd.generation.replay import Replay
from raykd.generation.sampling import FrozenTeacher
from raykd.generation.schedule import Schedule
from raykd.losses.divergences import student_log_probs
from raykd.losses.objective import Objective
from raykd.models.llama import Llama
from raykd.recipe.source import Source
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.stages import walk
from raykd.stages.load import load
from raykd.store import care
from raykd.store.commit import StoreWriter
from raykd.store.reader import Store
from raykd.training.arm import World

techniques.load_terms()
V = 11
STEPS = 30
OWN = 5
LENGTH = 4
EOS = 2
CLASSES = [f"token {i}" for i in range(V)]
SPANS = ((0, 8.0), (12, 20))  # nothing is drawn from 8 to 12, an interval without text
CODECS = {
    "dense": {"codec": "dense", "values": "fp16"},
    "topk": {"codec": "topk", "top": V, "temperatures": [1.0]},
    "comb": {"codec": "comb", "points": 255, "temperatures": [1.0]},
}
TERMS = {
    "ghost": {"ghost": {}},
    "ghost, expected": {"ghost": {"rejections": "expected"}},
    "correction": {"ghost": {"form": "correction"}},
    "pair": {"ghost": {"form": "pair"}},
    "distilspec": {"distilspec": {"divergence": "forward"}},
    "lk": {"distilspec": {"divergence": "lk"}},
    "gkd": {"gkd": {}},
}
ALONE = World()
GROUPS = [[0, 2], [4, 6], [12, 14], [16, 18]]
ANY_CODEC = ["ghost", "correction", "pair", "distilspec"]


def llama(seed: int) -> Llama:
    torch.manual_seed(seed)
    module = Llama(
        classes=V, steps=STEPS, width=16, layers=1, heads=2, kv_heads=1, inner=24, tied=False
    )
    module.lm_head.weight.data.mul_(8)
    return module


STUDENT = llama(0)
TEACHER = FrozenTeacher(llama(1))


def rows(group: int) -> Batch:
    """Rows of two documents each; the last begins with a prompt."""
    draw = torch.Generator().manual_seed(group)
    tokens = torch.randint(V, (OWN, 21), generator=draw)
    places = torch.cat([torch.arange(9), torch.arange(12)]).expand(OWN, -1)
    mask = torch.ones(OWN, 20, dtype=torch.bool)
    mask[-1, :6] = False
    inputs = torch.stack([tokens, places], -1)[:, :-1]
    return Batch(torch.arange(OWN) + 100 * group, inputs, mask, tokens[:, 1:])


def place(folder: Path, codec: str = "dense", run: str = "a/student-0") -> DraftLogSpec:
    return draft_log_spec(folder / "log", run, CLASSES, 1.0, CODECS[codec] | {"rows_per_shard": 9})


def wrote(
    log: DraftLogSpec, *, world: World = ALONE, first: int = 0, last: int = 20
) -> dict[int, Batch]:
    """The batches of a training of 20 steps, two to a group, that is reported every 4; from one
    step to another.
    """
    share = world.share(OWN)

    def draw(group: int):
        every = rows(group)
        mine = replace(
            every, row_id=every.row_id[share], inputs=every.inputs[share], mask=every.mask[share]
        )
        source = Source(kind="drafts", length=LENGTH)
        return write_rows(
            source, TextShape(STEPS, EOS, V), group, 3, STUDENT, TEACHER, mine, share=share
        )

    found = OwnRows(Schedule(passes=2, every=4), draw, SPANS)
    found.log = DraftLog(log, found.intervals(20), OWN, share)
    return {step: found(step) for step in range(first, last) if found.counts(step)}


def read(log: DraftLogSpec, classes: list[str] = CLASSES, steps: int = STEPS) -> Replay:
    return Replay(log.where, classes, steps, torch.device("cpu"))


@pytest.fixture(scope="module", params=CODECS)
def both(request, tmp_path_factory) -> tuple[DraftLogSpec, dict[int, Batch]]:
    log = place(tmp_path_factory.mktemp(request.param), request.param)
    return log, wrote(log)


def told(batch: Batch) -> dict[str, list[Any]]:
    """Each draft's numbers where a token is told."""
    rollout = batch.rollout
    mask = batch.mask
    assert rollout is not None
    values = {
        name: getattr(rollout, name) for name in ("accepted", "rejected", "correction", "tail")
    }
    values |= {"label": batch.label, "place": batch.inputs[..., 1]}
    return {"row": batch.row_id.tolist()} | {
        k: [v[m].tolist() for v, m in zip(x, mask, strict=True)] for k, x in values.items()
    }


def test_a_log_holds_every_draft_as_it_was(both):
    log, live = both
    again = read(log)
    drawn = Store(log.where).column("drawn", "train").values
    groups = [step for step in live if step % 2 == 0]
    assert groups == [group for groups in GROUPS for group in groups]
    assert len(again) == OWN * len(groups)
    seen = {name: set() for name in ("ended early", "rejected", "all stayed", "two documents")}
    for group in groups:
        at = np.flatnonzero(drawn == group)
        found = again.batch(at)
        mine = told(live[group])
        assert told(found) == mine
        assert found.rollout
        assert live[group].rollout
        for one, two, a, b in zip(
            found.rollout.log_q,
            live[group].rollout.log_q,
            found.mask,
            live[group].mask,
            strict=True,
        ):
            assert torch.allclose(one[a], two[b], rtol=2**-11, atol=1e-7)
        for row, mask in enumerate(live[group].mask):
            rejected = live[group].rollout.rejected[row].any().item()
            seen["ended early"].add(int(mask.sum()) < LENGTH)
            seen["rejected"].add(rejected)
            seen["all stayed"].add(not rejected)
            seen["two documents"].add((live[group].inputs[row, 1:, 1] == 0).any().item())
    assert all(values == {True, False} for values in seen.values()), seen


@pytest.mark.parametrize("name", TERMS)
def test_a_kept_draft_teaches_what_it_taught_live(name, both):
    log, live = both
    objective = Objective({key: TermSpec(**settings) for key, settings in TERMS[name].items()})

    def gradient(batch: Batch) -> tuple[Tensor, Tensor]:
        STUDENT.zero_grad()
        loss = objective.total(
            *objective(Signals(STUDENT(batch.inputs)["logits"], batch.mask), batch)
        )
        loss.backward()
        return loss.detach(), torch.cat(
            [p.grad.flatten() for p in STUDENT.parameters() if p.grad is not None]
        )

    again = read(log).batch(np.flatnonzero(Store(log.where).column("drawn", "train").values == 6))
    sparse = log.codec.name in ("comb", "topk")
    if sparse and name not in ANY_CODEC:
        with pytest.raises(RecipeError, match=r'store\.codec = "dense"'):
            gradient(again)
        return
    (one, mine) = gradient(live[6])
    (two, theirs) = gradient(again)
    drawn = log.codec.name == "comb" and name in ("ghost", "distilspec")
    assert torch.cosine_similarity(mine, theirs, 0) > (0.98 if drawn else 1 - 1e-5)
    if not drawn:
        assert torch.allclose(one, two, rtol=2e-3)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_workers_writes_one_log(size, tmp_path):
    alone = place(tmp_path / "alone")
    shared = place(tmp_path / "shared")
    wrote(alone)
    for rank in range(size):
        assert not (shared.where / "_MANIFEST.json").exists()
        wrote(shared, world=World(rank, size))
    one, two = (read_json(log.where / "_MANIFEST.json")["shards"] for log in (alone, shared))
    assert [_rows_of(shard) for shard in one] == [_rows_of(shard) for shard in two]
    # Kernels choose by the number of rows in a call, so answers differ in their last bits, and a
    # half may be the next one.
    first, second = (read(log) for log in (alone, shared))
    mine, theirs = (each.batch(np.arange(len(first))) for each in (first, second))
    assert told(mine) == told(theirs)
    assert mine.teacher
    assert theirs.teacher
    torch.testing.assert_close(mine.teacher.logits, theirs.teacher.logits, rtol=2**-10, atol=1e-5)


def _rows_of(shard: dict[str, Any]) -> dict[str, Any]:
    """A commit record without what the bytes of its file decide."""
    return {name: shard[name] for name in ("number", "split", "first", "last", "rows")}


def test_a_training_that_goes_on_from_a_report_finishes_its_log(tmp_path):
    whole = place(tmp_path / "whole")
    parted = place(tmp_path / "parted")
    wrote(whole)
    wrote(parted, last=15)
    with pytest.raises(StoreError, match="not a complete store"):
        read(parted)
    wrote(parted, first=4)  # a checkpoint may be older than what is kept
    assert read_json(whole.where / "_MANIFEST.json") == read_json(parted.where / "_MANIFEST.json")
    assert care.verify(parted.where) == {"complete": True, "shards": 4 * OWN, "damaged": []}


def last_of(
    rank: int, log: DraftLogSpec, batches: dict[int, Batch], wait_s: float, barrier: Any
) -> None:
    """One worker's drafts of all groups, committed `wait_s` after the others have come as far."""
    share = World(rank, 2).share(OWN)
    writer = DraftLog(log, GROUPS, OWN, share)
    for group, batch in batches.items():
        if group == GROUPS[-1][-1]:
            barrier.wait(600)
            time.sleep(wait_s)
        writer.add(group, part(batch, share))


def part(batch: Batch, share: slice) -> Batch:
    """A worker's rows of a batch."""
    rollout = batch.rollout
    assert rollout
    assert batch.teacher
    names = ("log_q", "weight", "accepted", "rejected", "correction", "tail")
    mine = replace(rollout, **{name: getattr(rollout, name)[share] for name in names})
    teacher = Signals(batch.teacher.logits[share], batch.mask[share])
    whole = {name: getattr(batch, name)[share] for name in ("row_id", "inputs", "mask", "label")}
    return replace(batch, **whole, rollout=mine, teacher=teacher)


@pytest.mark.parametrize("wait_s", [0, 0.01, 0.03])
def test_workers_that_end_a_log_at_once_leave_it_whole(wait_s, tmp_path):
    alone = place(tmp_path / "alone")
    shared = place(tmp_path / "shared")
    batches = {step: batch for step, batch in wrote(alone).items() if step % 2 == 0}
    several = multiprocessing.get_context("fork")
    barrier = several.Barrier(2)
    workers = [
        several.Process(target=last_of, args=(rank, shared, batches, wait_s * (1 - rank), barrier))
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert read_json(shared.where / "_MANIFEST.json") == read_json(alone.where / "_MANIFEST.json")
    assert care.verify(shared.where)["complete"]


def test_a_damaged_shard_of_an_earlier_attempt_is_written_again(tmp_path):
    whole = place(tmp_path / "whole")
    hurt = place(tmp_path / "hurt")
    wrote(whole)
    wrote(hurt, last=15)
    (file, *_) = sorted((hurt.where / "data").iterdir())
    file.write_bytes(b"cut")
    assert "raykd train RECIPE" in care.rewriting_hint(hurt.where)
    wrote(hurt)
    assert read_json(whole.where / "_MANIFEST.json") == read_json(hurt.where / "_MANIFEST.json")


def test_every_worker_reads_its_part_of_one_order(both):
    again = read(both[0])
    whole = replay_rows(again, 6, 1, 9, share=slice(0, 6))()
    parts = [replay_rows(again, 6, 1, 9, share=World(rank, 4).share(6))() for rank in range(4)]
    assert torch.cat([part.row_id for part in parts]).equal(whole.row_id)
    seen = torch.cat(
        [replay_rows(again, 8, 1, step, share=slice(0, 8))().row_id for step in range(5)]
    )
    assert len(set(seen.tolist())) == len(again), (
        "once through the log before any draft comes again"
    )


def test_a_wider_student_has_its_padding_left_out(both):
    again = read(both[0]).batch(np.arange(OWN))
    logits = torch.randn(*again.mask.shape, V + 3)
    narrow, wide = (
        student_log_probs(Signals(z, again.mask), again) for z in (logits[..., :V], logits)
    )
    assert torch.equal(narrow, wide)
    with pytest.raises(RecipeError, match="columns"):
        student_log_probs(Signals(logits[..., : V - 1], again.mask), again)


BROKEN = {
    "accepted": (("accepted", LENGTH + 1), "accepted tokens that were not drafted"),
    "negative": (("accepted", -1), "accepted tokens that were not drafted"),
    "correction": (("correction", V), "corrections that do not fit"),
    "below": (("correction", -2), "corrections that do not fit"),
    "text": (("text_steps", 1), "belong"),
    "steps": (("steps", 0), "belong"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_numbers_that_can_not_be_are_refused(name, tmp_path):
    (column, value), words = BROKEN[name]
    log = place(tmp_path / "sound")
    bad = place(tmp_path / "bad")
    wrote(log)
    store = Store(log.where)
    writer = StoreWriter(bad.where, bad.identity)
    shards = DraftLog(bad, GROUPS, OWN, slice(0, OWN)).shards
    for shard, table in zip(
        [s for each in shards for s in each], store.shards("train"), strict=True
    ):
        at = table.schema.get_field_index(column)
        wrong = np.full(len(table), value, np.int32)
        writer.commit(shard, table.set_column(at, table.schema.field(at), pa.array(wrong)))
    writer.finish([s for each in shards for s in each], {})
    with pytest.raises(StoreError, match=words):
        read(bad)


TOLD = {
    "temperature 0": ({"drafts": {"run": "r", "temperature": 0.0}}, "a temperature that is none"),
    "words": ({"drafts": {"run": "r", "temperature": "x"}}, "is no log of drafts"),
    "a number": ({"drafts": 3}, "is no log of drafts"),
    "nothing": ({"drafts": None}, "is no log of drafts"),
    "no vocabulary": ({"vocabulary": None}, "is no log of drafts"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_manifest_that_tells_what_can_not_be_is_refused(name, tmp_path):
    told, words = TOLD[name]
    log = place(tmp_path)
    identity = log.identity | told
    wrote(log)
    retell(log, identity)
    with pytest.raises(StoreError, match=words):
        read(log)


def retell(log: DraftLogSpec, identity: dict[str, Any]) -> None:
    """A manifest of another identity, with a digest that is right."""
    path = log.where / "_MANIFEST.json"
    body = {k: v for k, v in (read_json(path) | {"identity": identity}).items() if k != "sha256"}
    path.write_bytes(to_json(body | {"sha256": digest_of(body)}))


def test_answers_of_another_vocabulary_are_refused(tmp_path):
    narrow = draft_log_spec(tmp_path / "log", "run", CLASSES[:5], 1.0, CODECS["dense"])
    wrote(narrow)
    retell(narrow, place(tmp_path).identity)
    with pytest.raises(StoreError, match="answers of another vocabulary"):
        read(narrow)


def test_terms_that_a_log_can_not_tell_are_refused_before_training(both):
    again = read(both[0])
    again.check({"ghost": TermSpec(), "kd": TermSpec(temperature=3.0)}, 1.0)
    again.check({"gkd": TermSpec(beta=0.0)}, 1.0)
    with pytest.raises(
        RecipeError, match=r"source\.temperature = 0\.7, but .* was drafted at 1\.0; write that"
    ):
        again.check({"ghost": TermSpec()}, 0.7)
    lk = {"distilspec": TermSpec(divergence="lk")}
    if both[0].codec.name == "dense":
        again.check(lk, 1.0)
    else:
        with pytest.raises(RecipeError, match="only a forward divergence can be computed"):
            again.check(lk, 1.0)


def test_a_log_of_others_is_refused(both, tmp_path):
    log = both[0]
    with pytest.raises(DataError, match="equal in number, different in meaning"):
        read(log, [*CLASSES[1:], CLASSES[0]])
    with pytest.raises(
        DataError, match=r"source\.log: texts of \d+ tokens, but the student was built for 9"
    ):
        read(log, steps=9)
    with pytest.raises(StoreError, match="another recipe"):
        wrote(
            replace(log, identity=log.identity | {"drafts": {"run": "another", "temperature": 1.0}})
        )
    with pytest.raises(RecipeError, match='"hidden" keeps no answers'):
        draft_log_spec(tmp_path, "run", CLASSES, 1.0, {"codec": "hidden", "head": "head"})


def test_a_run_keeps_its_drafts_and_another_learns_from_them_without_a_teacher(tmp_path):
    recipe = texts.recipe(tmp_path, texts.tokenizer(tmp_path))
    sets = ("technique=ghost", "terms.kd.weight=0", "control=false", "optim.steps=20")
    run = walk.train(load(recipe, (*sets, "source.keep=true")), tmp_path / "runs")
    log = run / "drafts" / "student-0"
    assert care.verify(log)["complete"]
    assert Store(log).row_id("train").tolist() == list(range(8 * 20))
    sets = (*sets, "source.kind=replay", f"source.log={run}/drafts/student-{{seed}}")
    replay = load(recipe, sets).model_copy(update={"teacher": None})
    history = read_json(walk.train(replay, tmp_path / "runs") / "arms" / "student-0" / "arm.json")[
        "history"
    ]
    assert history[-1]["terms"]["ghost"] < history[0]["terms"]["ghost"]
    assert "lag" not in history[0]
    (log / "_MANIFEST.json").unlink()
    with pytest.raises(
        RecipeError, match=r"source\.log: .*student-0 is not a finished log of drafts"
    ):
        load(recipe, sets)
