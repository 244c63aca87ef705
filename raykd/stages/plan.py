"""The plan of a recipe without computing it: what each stage would do, what is done, and what it
takes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from raykd import models
from raykd.data import Rows
from raykd.data.prepared.parts import PreparedParts
from raykd.data.prepared.work import Work
from raykd.data.table import first_rows
from raykd.deploy import forms
from raykd.errors import DataError
from raykd.files.memory import anonymous_bytes
from raykd.files.open import open_place
from raykd.losses.reads import reads_of, stored_for
from raykd.models.adapter import Adapter
from raykd.orchestration import cluster, scoring
from raykd.recipe.recipe import Recipe
from raykd.stages.check import check_with_data
from raykd.stages.run_folder import RunFolder
from raykd.store import care
from raykd.store.commit import plan_shards
from raykd.store.logits import codec_name
from raykd.teacher.identity import store_identity
from raykd.training.arms import arms_of

GB = 10**9
LATER = "once the rows are prepared"
SIGNALS_A_STEP = 2  # valence and trajectory, fp16, beside the logits


def plan(recipe: Recipe, out: Path, address: str | None = None) -> dict[str, Any]:
    """Stages with their state, and the run's sizes.

    Errors in data and weights come here, before any work.
    """
    run_folder = RunFolder(recipe, out, address)
    source = run_folder.source
    if isinstance(source, PreparedParts) and not source.is_ready:
        return _unprepared(run_folder, source.work)
    run_folder.check_links()
    data = run_folder.table
    train = first_rows(run_folder.source, "train")
    students = [
        _parameters(recipe.student.of_seed(seed), data.shape, "student") for seed in recipe.seeds
    ]
    sizes = {"student": students[0]}
    teacher = None
    if recipe.teacher:
        teacher = models.build_model(recipe.teacher, **data.shape, key="teacher")
        sizes["teacher"] = sum(p.numel() for p in teacher.parameters())
    check_with_data(recipe, run_folder.source, run_folder.path)
    if recipe.valence.source == "column" and train.valence is None:
        raise DataError(
            'valence.source = "column", but the data has none; name it in data.columns.valence'
        )
    if run_folder.untrained or not run_folder.is_scored:
        cluster.check_here(recipe, address)
    is_one_a_row = teacher is not None and not data.is_text and _answers_once(teacher, train)
    return {
        "run": str(run_folder.path),
        "data": data.describe(),
        "rows": data.rows_of_splits,
        "unfit": [unfit._asdict() for unfit in data.unfit],
        "parameters": sizes,
        "workers": list(recipe.scale.workers),
        "memory_bytes_a_worker": _memory(run_folder),
        "disk_bytes": _disk(run_folder, is_one_a_row),
        "tracking": run_folder.uri,
        "stages": _stages(run_folder, is_one_a_row),
        "nearest_store": _nearest(run_folder),
    }


def _unprepared(run_folder: RunFolder, work: Work) -> dict[str, Any]:
    """The plan where rows must be prepared before more is known."""
    recipe = run_folder.recipe
    found = work.estimate()
    rows = f"about {found.rows:,} rows" if found.rows else "as many rows as the function gives"
    disk = f"{found.disk_bytes:,} bytes" if found.rows else f"{found.row_bytes} bytes a row"
    what = f"{rows}; about {disk} before compression, in {work.folder.address}"
    if found.source_bytes:
        what = f"{found.source_bytes:,} bytes of files, {what}"
    stages = ["train", *(["tune"] if recipe.search else []), "export", "report"]
    if recipe.teacher and stored_for(recipe):
        stages.insert(0, "score")
    sizes = {}
    if shape := work.shape_of_text:
        sizes["student"] = _parameters(recipe.student.of_seed(recipe.seeds[0]), shape, "student")
        if recipe.teacher:
            sizes["teacher"] = _parameters(recipe.teacher, shape, "teacher")
    return {
        "run": None,
        "data": f"{work.name}: {rows}, which are not prepared yet",
        "rows": {},
        "unfit": [],
        "parameters": sizes,
        "workers": list(recipe.scale.workers),
        "memory_bytes_a_worker": None,
        "disk_bytes": {"rows": found.disk_bytes} if found.rows else {},
        "tracking": run_folder.uri,
        "stages": [
            {"stage": "prepare", "done": False, "what": what},
            *({"stage": stage, "done": False, "what": f"foretold {LATER}"} for stage in stages),
        ],
        "nearest_store": None,
    }


def _parameters(ref: Any, shape: dict[str, int], key: str) -> int:
    return sum(p.numel() for p in models.build_model(ref, **shape, key=key).parameters())


@torch.inference_mode()
def _answers_once(teacher: nn.Module, rows: Rows) -> bool:
    """Whether a teacher answers once for a series, not at each of its steps."""
    one = rows.take([0])
    steps = one.mask.shape[1]
    signals = Adapter(teacher).eval()(torch.from_numpy(one.inputs), torch.from_numpy(one.mask))
    return steps > 1 and signals.logits.shape[1] == 1


def _stages(run_folder: RunFolder, is_one_a_row: bool) -> list[dict[str, Any]]:
    recipe = run_folder.recipe
    arms = arms_of(recipe)
    stages: list[dict[str, Any]] = []
    if isinstance(run_folder.source, PreparedParts):
        address = run_folder.source.work.folder.address
        what = f"{len(run_folder.table.parts)} parts, in {address}"
        stages.append({"stage": "prepare", "done": True, "what": what})
    if run_folder.store is not None:
        table = run_folder.table
        shards = plan_shards(table.rows_of_parts, recipe.store.rows_per_shard)
        committed = open_place(run_folder.store).listed("_commits")
        done = [s for s in shards if f"_commits/{s.number:05d}.json" in committed]
        rows = sum(table.rows_of_splits.values())
        size = _store_bytes(run_folder, is_one_a_row)
        what = (
            f"{rows} rows in {len(shards)} shards, {len(done)} scored; "
            f"about {size:,} bytes before compression, in {run_folder.store}"
        )
        stages.append({"stage": "score", "done": run_folder.is_scored, "what": what})
    left = len(run_folder.untrained)
    what = (
        f"{len(arms)} arms of {recipe.optim.steps} steps of {recipe.optim.batch} rows, "
        f"{len(arms) - left} trained"
    )
    stages.append({"stage": "train", "done": left == 0, "what": what})
    if recipe.search:
        what = f"{recipe.search.trials} trials over {', '.join(recipe.search.space)}"
        stages.append({"stage": "tune", "done": run_folder.is_searched, "what": what})
    what = ", ".join(
        ["the best seed's student", *(forms.FILES[form] for form in forms.asked(recipe.export))]
    )
    stages.append({"stage": "export", "done": run_folder.is_exported, "what": what})
    stages.append(
        {
            "stage": "report",
            "done": run_folder.is_reported,
            "what": "report.json, report.html, MLflow",
        }
    )
    return stages


def _nearest(run_folder: RunFolder) -> dict[str, Any] | None:
    """The store that differs least from the recipe's, where that does not exist, and in what."""
    if run_folder.store is None or open_place(run_folder.store).get("_RECIPE.json") is not None:
        return None
    return care.nearest(
        scoring.stores_address(run_folder.recipe, run_folder.out.resolve()),
        store_identity(run_folder.recipe, run_folder.table),
    )


def _store_bytes(run_folder: RunFolder, is_one_a_row: bool) -> int:
    """fp16 logits, or what is kept of them, and valence at every step, or once a row where that is
    how the teacher answers; 24 bytes a row beside; no other signals.
    """
    settings = run_folder.recipe.store
    table = run_folder.table
    classes = len(table.classes)
    sizes = {"comb": settings.points, "topk": 4 * settings.top}
    of_logits = sizes.get(codec_name(settings, classes), 2 * classes)
    width = of_logits + 2 * SIGNALS_A_STEP
    size = 0
    for split, count in table.rows_of_splits.items():
        answers = count if is_one_a_row else _steps(run_folder, split)
        size += answers * width + 24 * count
    return size


def _steps(run_folder: RunFolder, split: str) -> int:
    """The valid steps of a split; where it is read in parts, by those of the first."""
    if not run_folder.table.in_parts:
        return int(run_folder.dataset.splits[split].mask.sum())
    some = first_rows(run_folder.source, split)
    return round(some.mask.sum() / len(some) * run_folder.table.rows(split))


def _memory(run_folder: RunFolder) -> int:
    """Bytes of memory of every training worker at its peak, without what the student's own steps
    take.

    This process has the same libraries, and holds the same rows. They are counted once more,
    because they are read before they are padded. Where rows are read in parts, those of validation
    and test are held, and some batches are ahead.
    """
    scale = run_folder.recipe.scale
    train = first_rows(run_folder.source, "train")
    batch = round(_row_bytes(train) * run_folder.recipe.optim.batch / scale.workers[0])
    held = [_bytes_of(rows) for rows in run_folder.dataset.splits.values()]
    ahead = (scale.readers + 1) * batch if run_folder.table.in_parts else batch
    return anonymous_bytes() + sum(held) + ahead


def _disk(run_folder: RunFolder, is_one_a_row: bool) -> dict[str, int]:
    """Bytes on disk: of the store, at most, of a node's cache, and of rows that were prepared.

    A node keeps the teacher's answers unpacked; where rows are read in parts it keeps them, too, up
    to `scale.cache_gb`.
    """
    recipe = run_folder.recipe
    store = 0 if run_folder.store is None else _store_bytes(run_folder, is_one_a_row)
    cache = store if reads_of(recipe) else 0
    if run_folder.table.in_parts:
        train = first_rows(run_folder.source, "train")
        cache += round(_row_bytes(train) * run_folder.table.rows("train"))
        cache = min(cache, round(recipe.scale.cache_gb * GB))
    found = {"store": store, "cache": cache}
    if isinstance(run_folder.source, PreparedParts):
        found["rows"] = run_folder.source.bytes
    return found


def _row_bytes(rows: Rows) -> float:
    return _bytes_of(rows) / len(rows)


def _bytes_of(rows: Rows) -> int:
    return sum(values.nbytes for values in vars(rows).values() if values is not None)


def table(found: dict[str, Any]) -> str:
    """The plan for a terminal."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    disk = ", ".join(f"{key} {size / 2**20:,.1f} MiB" for key, size in found["disk_bytes"].items())
    low, high = found["workers"]
    memory = found["memory_bytes_a_worker"]
    of_each = "" if memory is None else f", {memory / 2**20:,.0f} MiB of memory in each"
    lines = [
        f"run         {found['run'] or f'named {LATER}'}",
        f"data        {found['data']}",
        f"parameters  {sizes or f'known {LATER}'}",
        f"workers     {low if low == high else f'{low} to {high}'}{of_each}",
        f"disk        {disk or f'known {LATER}'}",
        f"tracking    {found['tracking']}",
    ]
    lines += [
        f"{'done' if s['done'] else 'to do':<12}{s['stage']:<8}{s['what']}" for s in found["stages"]
    ]
    if found["unfit"]:
        lines += ["left out    rows that teach nothing:"]
        lines += [
            f"{'':<14}row {one['row']} {one['why']} ({one['place'] or 'of the function'})"
            for one in found["unfit"]
        ]
    if near := found["nearest_store"]:
        lines += [f"{'':<12}this recipe has no store; {near['store']} is nearest:"]
        lines += [f"{'':<14}{difference}" for difference in near["differences"]]
    return "\n".join(lines)
