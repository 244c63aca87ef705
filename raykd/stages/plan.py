"""The plan of a recipe without computing it: what each stage would do, what is done, and what it
takes.
"""

from pathlib import Path
from typing import Any

from raykd import models
from raykd.deploy import forms, run_artefact
from raykd.errors import DataError
from raykd.files.open import open_place
from raykd.losses.terms import needs_of
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.stages.walk import Place
from raykd.store import care
from raykd.store.commit import plan_shards
from raykd.store.logits import codec_name
from raykd.teacher.identity import store_identity
from raykd.training import run_files
from raykd.training.arms import arms_of

SIGNALS_A_STEP = 2  # valence and trajectory, fp16, beside the logits


def plan(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Stages with their state, and the run's sizes.

    Errors in data and weights come here, before any work.
    """
    place = Place(recipe, out)
    data, train = place.dataset, place.dataset.splits["train"]
    students = [
        _parameters(recipe.student.of_seed(seed), data.shape, "student") for seed in recipe.seeds
    ]
    sizes = {"student": students[0]}
    if recipe.teacher:
        sizes["teacher"] = _parameters(recipe.teacher, data.shape, "teacher")
    place.check_text()
    run_artefact.check(recipe, place.dataset)
    if recipe.valence.source == "column" and train.valence is None:
        raise DataError(
            'valence.source = "column", but the data has none; name it in data.columns.valence'
        )
    return {
        "run": str(place.folder),
        "data": data.describe(),
        "rows": {name: len(rows) for name, rows in data.splits.items()},
        "parameters": sizes,
        "workers": list(recipe.scale.workers),
        "memory_bytes_a_worker": _memory(place),
        "tracking": place.uri,
        "stages": _stages(place),
        "nearest_store": _nearest(place),
    }


def _parameters(ref: Any, shape: dict[str, int], key: str) -> int:
    return sum(p.numel() for p in models.build_model(ref, **shape, key=key).parameters())


def _stages(place: Place) -> list[dict[str, Any]]:
    recipe, arms = place.recipe, arms_of(place.recipe)
    stages = []
    if place.store is not None:
        shards = plan_shards(
            {n: len(r) for n, r in place.dataset.splits.items()}, recipe.store.rows_per_shard
        )
        committed = open_place(place.store).listed("_commits")
        done = [s for s in shards if f"_commits/{s.number:05d}.json" in committed]
        rows = sum(map(len, place.dataset.splits.values()))
        what = f"{rows} rows in {len(shards)} shards, {len(done)} scored; about {_store_bytes(place):,} bytes"
        what += f" before compression, in {place.store}"
        stages.append({"stage": "score", "done": place.is_scored, "what": what})
    left = len(place.untrained)
    what = f"{len(arms)} arms of {recipe.optim.steps} steps of {recipe.optim.batch} rows, {len(arms) - left} trained"
    stages.append({"stage": "train", "done": left == 0, "what": what})
    if recipe.search:
        what = f"{recipe.search.trials} trials over {', '.join(recipe.search.space)}"
        stages.append({"stage": "tune", "done": place.is_searched, "what": what})
    what = ", ".join(
        ["the best seed's student", *(forms.FILES[form] for form in forms.asked(recipe.export))]
    )
    stages.append({"stage": "export", "done": place.is_exported, "what": what})
    is_reported = (place.folder / run_files.REPORT).exists()
    stages.append(
        {"stage": "report", "done": is_reported, "what": "report.json, report.html, MLflow"}
    )
    return stages


def _nearest(place: Place) -> dict[str, Any] | None:
    """Where the recipe's store does not exist, the one beside it that differs least, and in what."""
    if place.store is None or open_place(place.store).get("_RECIPE.json") is not None:
        return None
    return care.nearest(
        scoring.home(place.recipe, place.out.resolve()), store_identity(place.recipe, place.dataset)
    )


def _store_bytes(place: Place) -> int:
    """fp16 logits, or what is kept of them, and valence at every step, 24 bytes a row beside; no
    other signals.
    """
    held, classes = place.recipe.store, len(place.dataset.classes)
    of_logits = {"comb": held.points, "topk": 4 * held.top}.get(
        codec_name(held, classes), 2 * classes
    )
    width = of_logits + 2 * SIGNALS_A_STEP
    return sum(
        int(rows.mask.sum()) * width + 24 * len(rows) for rows in place.dataset.splits.values()
    )


def _memory(place: Place) -> int:
    """Bytes that every training worker holds: the training and validation rows, and the teacher's
    logits.
    """
    splits = place.dataset.splits
    rows = sum(splits[name].inputs.nbytes + splits[name].mask.nbytes for name in ("train", "val"))
    return rows + (_store_bytes(place) if needs_of(place.recipe.terms) else 0)


def table(found: dict[str, Any]) -> str:
    """The plan for a terminal."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    low, high = found["workers"]
    lines = [
        f"run         {found['run']}",
        f"data        {found['data']}",
        f"parameters  {sizes}",
        f"workers     {low if low == high else f'{low} to {high}'}, "
        f"{found['memory_bytes_a_worker'] / 2**20:,.1f} MiB of rows and signals in each",
        f"tracking    {found['tracking']}",
    ]
    lines += [
        f"{'done' if s['done'] else 'to do':<12}{s['stage']:<8}{s['what']}" for s in found["stages"]
    ]
    if near := found["nearest_store"]:
        lines += [f"{'':<12}this recipe has no store; {near['store']} is nearest:"]
        lines += [f"{'':<14}{difference}" for difference in near["differences"]]
    return "\n".join(lines)
