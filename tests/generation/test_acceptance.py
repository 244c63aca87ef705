"""Laws of a student judged as its drafter by the teacher, then a run that reports it, and one from
its weights on.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import texts
import torch
from digests import recipe_digest
from texts import STEPS

from raykd import data, models
from raykd.data import Rows
from raykd.errors import DataError, RecipeError
from raykd.files.atomic import read_json
from raykd.generation import acceptance, judge_drafter
from raykd.generation.acceptance import Acceptance
from raykd.generation.own_rows import TextShape
from raykd.generation.reader import TorchReader
from raykd.models.llama import Llama
from raykd.models.weights import read_tensors
from raykd.recipe.drafter import Drafter
from raykd.recipe.recipe import Recipe
from raykd.reports import compare, text_measures
from raykd.stages import walk
from raykd.stages.check import check_with_data
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.training import predictions, run_files

VOCAB = 13
ROWS = 24
TEXT = TextShape(STEPS, None, VOCAB)


def llama(seed: int) -> Llama:
    torch.manual_seed(seed)
    module = Llama(
        classes=VOCAB, steps=STEPS, width=16, layers=1, heads=2, kv_heads=1, inner=32, tied=False
    )
    module.lm_head.weight.data.mul_(40)
    return module.eval()


def rows(*, told: int = 0) -> Rows:
    """Two rows to a document of random tokens; those from step `told` on are told."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (ROWS, STEPS + 1))
    inputs = np.stack(
        [tokens[:, :-1], np.broadcast_to(np.arange(STEPS), (ROWS, STEPS))], -1
    ).astype(np.int32)
    mask = np.broadcast_to(np.arange(STEPS) >= told, (ROWS, STEPS))
    return Rows(
        np.arange(ROWS) + 100,
        inputs,
        mask,
        np.where(mask, tokens[:, 1:], -100),
        np.arange(ROWS) // 2,
    )


def judged(teacher: Llama, student: Llama, **how) -> Acceptance:
    settings = {"prompt": 8, "count": 24, "gamma": 3} | how
    read = TorchReader(teacher)
    split = rows()
    asked = Drafter.model_validate(settings)
    return judge_drafter.judge(
        read,
        TorchReader(student),
        split,
        asked,
        TEXT,
        judge_drafter.teacher_texts(read, split, asked, TEXT),
    )


def test_a_drafter_that_is_its_teacher_has_every_draft_accepted():
    found = judged(llama(0), llama(0))
    assert np.array_equal(found.accepted, found.tested)
    np.testing.assert_allclose(found.overlap, found.tested, rtol=1e-6)
    assert (found.tokens == 24).all()
    assert (found.calls == 6).all()  # 3 drafted and one more a call
    np.testing.assert_allclose(found.shared, found.places, rtol=1e-6)


def test_what_stays_is_in_the_mean_what_both_laws_share():
    found = judged(llama(0), llama(1))
    per_text = found.accepted - found.overlap  # a martingale: its mean is 0
    error = per_text.std() * len(per_text) ** 0.5
    assert found.tested.sum() > 300
    assert 0.05 < found.overlap.sum() / found.tested.sum() < 0.95
    assert abs(per_text.sum()) < 3 * error


def test_the_teacher_s_own_texts_are_the_same_for_every_drafter_and_shared_alike():
    """Drafts of one token test every token of a text of the teacher's law, so there acceptance and
    overlap agree.
    """
    one, other = (judged(llama(0), llama(seed), gamma=1) for seed in (1, 2))
    assert np.array_equal(one.places, other.places)
    assert (one.places == 24).all()
    for found in (one, other):
        assert found.shared is not None
        per_text = found.overlap / found.tested - found.shared / found.places
        assert abs(per_text.mean()) < 3 * per_text.std() * len(per_text) ** -0.5
    swapped = judged(llama(1), llama(0), gamma=1)
    assert not np.array_equal(swapped.shared, one.shared)
    read = [TorchReader(llama(seed)) for seed in (0, 1)]
    seen = [3, 1, 4]
    told = [1, 5, 9, 2]
    how = Drafter()
    p, q = (
        torch.stack([each.step([t])[0] for t in [*seen, *told[:-1]]])[2:].softmax(-1).detach()
        for each in read
    )
    shared = judge_drafter.overlaps(*read, seen, told, how, VOCAB)
    assert torch.allclose(shared, torch.minimum(p, q).sum(1), atol=1e-6)


def test_a_drafter_of_a_shorter_context_is_judged_as_far_as_it_reads():
    torch.manual_seed(0)
    short = Llama(classes=VOCAB, steps=10, width=16, layers=1, heads=2, kv_heads=1, inner=32).eval()
    found = judged(llama(0), short)
    assert (found.places == 3).all()  # after 8 to 10 tokens
    assert (found.tokens == 24).all()


def test_texts_begin_in_every_document_before_any_begins_a_second_one():
    split = rows()
    how = Drafter(prompts=ROWS // 2 + 3, prompt=8)
    order = judge_drafter.openings(split, how)
    assert split.group[order[: ROWS // 2]].tolist() == list(range(ROWS // 2))
    assert len(set(order)) == len(order) == ROWS // 2 + 3
    last = split.group[order[ROWS // 2 :]].tolist()
    assert last == [0, 4, 8], "spread over the documents"
    for prompt in (STEPS, 60):  # one that fills the row leaves no token to draft
        with pytest.raises(
            DataError, match=rf"drafter\.prompt = {prompt}: no row of the test split"
        ):
            judge_drafter.openings(split, Drafter(prompt=prompt))


def test_a_row_with_a_prompt_of_its_own_begins_with_it():
    assert judge_drafter.beginning(rows(told=5).mask[0], 8) == 6
    assert judge_drafter.beginning(rows().mask[0], 8) == 8
    assert len(judge_drafter.openings(rows(told=5), Drafter(prompt=60))) == ROWS


def test_a_figure_of_several_texts_is_the_ratio_of_their_sums():
    one = judged(llama(0), llama(1))
    other = judged(llama(0), llama(2))
    found = text_measures.of_drafts({"student": {0: one, 1: other}, "control": {0: other, 1: one}})
    sample = found["acceptance"].sample()
    pooled = (one.overlap.sum() + other.overlap.sum()) / (one.tested.sum() + other.tested.sum())
    assert sample.student[0] == pytest.approx(pooled)
    assert sample.control is not None
    assert sample.control[0] == pytest.approx(pooled)
    assert sample.n == len(one.group)
    efficiency = found["block_efficiency"].sample().student
    assert efficiency[0] == pytest.approx(
        (one.tokens + other.tokens).sum() / (one.calls + other.calls).sum()
    )
    assert np.quantile(efficiency[1:], 0.1) < efficiency[0] < np.quantile(efficiency[1:], 0.9)
    same = text_measures.of_drafts({"student": {0: one}})["acceptance"]
    beside = same.beside(same).sample()
    assert beside.control is not None
    assert np.array_equal(beside.student, beside.control)


def test_drafts_are_read_as_they_were_written(tmp_path):
    found = judged(llama(0), llama(1))
    found.write(tmp_path / run_files.DRAFTS)
    for name, values in vars(acceptance.read_acceptance(tmp_path / run_files.DRAFTS)).items():
        assert np.array_equal(values, getattr(found, name)), name
    table = pq.read_table(tmp_path / run_files.DRAFTS)
    pq.write_table(table.drop_columns(["shared", "places"]), tmp_path / "old.parquet")
    old = {"student": {0: acceptance.read_acceptance(tmp_path / "old.parquet")}}
    assert set(text_measures.of_drafts(old)) == {"acceptance", "block_efficiency"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("drafting")
    return texts.recipe(home, texts.tokenizer(home))


@pytest.fixture(scope="module")
def walked(cluster, recipe) -> tuple[dict, Path]:
    sets = ("drafter.prompts=12", "drafter.prompt=6", "drafter.count=12", "seeds=[0, 1]")
    report = walk.run(load(recipe, sets), recipe.parent / "out")
    (folder,) = (recipe.parent / "out").glob("text-*")
    return report, folder


def test_a_run_reports_how_its_students_and_its_artefact_draft(walked):
    report, folder = walked
    found = [
        acceptance.read_acceptance(folder / "arms" / f"student-{seed}" / run_files.DRAFTS)
        for seed in (0, 1)
    ]
    told = report["student"]["metrics"]
    assert told["acceptance"]["value"] == pytest.approx(
        sum(f.overlap.sum() for f in found) / sum(f.tested.sum() for f in found)
    )
    assert told["block_efficiency"]["value"] == pytest.approx(
        sum(f.tokens.sum() for f in found) / sum(f.calls.sum() for f in found)
    )
    assert told["acceptance"]["n"] == 12
    assert told["overlap"]["value"] == pytest.approx(
        sum(f.shared.sum() for f in found) / sum(f.places.sum() for f in found)
    )
    of_drafts = {"acceptance", "block_efficiency", "overlap"}
    assert of_drafts <= set(report["gains"])
    assert set(report["control"]["metrics"]) == {"accuracy", "nll", "kl"} | of_drafts
    artefact = report["artefact"]["metrics"]
    seed = report["artefact"]["seed"]
    own = found[seed]
    assert artefact["acceptance"]["value"] == pytest.approx(
        own.overlap.sum() / own.tested.sum(), abs=5e-3
    )
    said = predictions.read(folder / "arms" / f"student-{seed}" / "predictions.parquet")
    assert artefact["nll"]["value"] == pytest.approx(said.metrics()["nll"], abs=1e-4)


def test_a_student_goes_on_from_the_weights_of_its_own_seed(walked, recipe):
    _, folder = walked
    sets = (
        f"student.weights={folder}/arms/student-{{seed}}/weights.safetensors",
        *(
            "drafter.prompts=12",
            "drafter.prompt=6",
            "drafter.count=12",
            "seeds=[0, 1]",
            "optim.steps=1",
            "name=on",
        ),
    )
    on = load(recipe, (*sets, "optim.learning_rate=1e-9"))
    shape = data.load(on.data).shape
    for seed in (0, 1):
        started = models.build_model(on.student.of_seed(seed), **shape, key="student")
        kept = read_tensors(folder / "arms" / f"student-{seed}" / "weights.safetensors", "x")
        assert torch.equal(started.state_dict()["model.norm.weight"], kept["model.norm.weight"])
    assert recipe_digest(on) != recipe_digest(on.model_copy(update={"seeds": [0]}))
    walk.run(on, folder.parent)
    (other,) = folder.parent.glob("on-*")
    first, second = (read_json(f / "report.json")["student"]["metrics"] for f in (folder, other))
    assert second["nll"]["value"] == pytest.approx(first["nll"]["value"], abs=1e-3)
    made = compare.compare([folder, other], folder.parent)
    told = made["runs"][1]["others"]
    assert set(told) == {"nll", "kl", "acceptance", "block_efficiency", "overlap"}
    assert told["nll"]["value"] == pytest.approx(0, abs=1e-3)
    assert told["nll"]["lo"] <= told["nll"]["value"] <= told["nll"]["hi"]
    turned = compare.compare([other, folder], folder.parent)["runs"][1]["others"]
    assert turned["acceptance"]["value"] == -told["acceptance"]["value"]
    with pytest.raises(RecipeError, match=r"student\.weights: no file .*student-2"):
        load(recipe, (*sets, "seeds=[0, 2]"))


def test_drafts_asked_for_otherwise_are_not_compared(walked):
    _, folder = walked
    one = compare.runs.read([folder])[0]
    gamma = replace(one, recipe=one.recipe.model_copy(update={"drafter": Drafter(gamma=7)}))
    assert set(compare.others(gamma, one)) == {"nll", "kl"}
    assert one.recipe.teacher
    teacher = one.recipe.teacher.model_copy(update={"settings": {}})
    of_another = replace(one, recipe=one.recipe.model_copy(update={"teacher": teacher}))
    assert set(compare.others(of_another, one)) == {"nll"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "drafter: judges students by their teacher, and there is none"),
        ({"drafter": {"prompt": 99}}, r"drafter\.prompt = 99"),
        ({"student": {"model": "series_encoder"}}, "drafter: student keeps no cache"),
    ],
)
def test_what_can_not_be_judged_is_refused_before_any_work(recipe, change, message):
    found = load(recipe, ("drafter.prompts=2",))
    changed = Recipe.model_validate(found.model_dump(mode="json") | change)
    run_folder = RunFolder(changed, recipe.parent / "out")
    with pytest.raises((RecipeError, DataError), match=message):
        check_with_data(changed, run_folder.source, run_folder.path, with_export=False)


def test_series_draft_nothing(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('technique = "none"\n[drafter]\n')
    found = load(path)
    with pytest.raises(RecipeError, match="drafter: needs text rows"):
        check_with_data(found, data.open_source(found.data), tmp_path)
