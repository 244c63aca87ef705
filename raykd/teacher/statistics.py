"""Statistics of a scored data set, for the store's manifest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raykd.data import Rows
from raykd.data.table import Source, Table, read_split
from raykd.data.vocabulary import table_digest
from raykd.errors import StoreError
from raykd.losses import valence
from raykd.recipe.recipe import Recipe
from raykd.signals import documents_of
from raykd.store.reader import Store
from raykd.store.stored_rows import stored_steps
from raykd.teacher.sums import Sums

FUTURES = {"valence", "trajectory", "saliency"}
WITHIN = {"futures": "documents"}  # of text: where a future ends
QUANTILES = [0, 0.25, 0.5, 0.75, 1]
HISTOGRAM = 24  # bins of saliency, as a report shows them


def store_statistics(recipe: Recipe, source: Source, store: Store) -> dict[str, Any]:
    """What the manifest says of the whole data set, so that row weights need no communication.

    `value_head.val_correlation` is the gate on the trajectory: its correlation with the realised
    future valence on validation rows.
    """
    table = source.table()
    saliency = store.column("saliency", "train").values
    known = saliency[np.isfinite(saliency)]
    correlation = _value_head_correlation(recipe, read_split(source, "val"), store)
    return {
        **_of_table(table),
        "saliency": {
            "mean": float(known.mean()) if len(known) else None,
            "std": float(known.std(ddof=1)) if len(known) > 1 else None,
            "quantiles": np.quantile(known, QUANTILES).tolist() if len(known) else None,
            "missing": int(len(saliency) - len(known)),
        },
        "value_head": {"val_correlation": correlation},
    }


def summed_statistics(table: Table, sums: Mapping[str, Sums]) -> dict[str, Any]:
    """The same of rows in parts, from the sums of the shards of each split.

    Means and correlations are those of the values up to rounding; quantiles and the histogram are
    as close as the bins of `sums`.
    """
    found = sums["train"]
    spread = {"quantiles": None, "histogram": None}
    if found.bins:
        spread = {
            "quantiles": [found.quantile(share) for share in QUANTILES],
            "histogram": found.histogram(HISTOGRAM),
        }
    return {
        **_of_table(table),
        "saliency": {
            "mean": found.saliency.x if found.saliency.count else None,
            "std": found.saliency.std,
            "missing": found.missing,
            **spread,
        },
        "value_head": {"val_correlation": sums["val"].future.correlation},
    }


def _of_table(table: Table) -> dict[str, Any]:
    """What is known of the rows without the teacher."""
    told = _vocabulary(table) | WITHIN if table.is_text else _class_prior(table)
    return {"rows": table.rows_of_splits, **told}


def check_futures(store: Store, table: Table, reads: frozenset[str]) -> None:
    """StoreError where signals of the future are read of a store of text in which they run from one
    document of a row into the next.
    """
    ends = store.manifest["statistics"].items() >= WITHIN.items()
    if table.is_text and reads & FUTURES and not ends:
        raise StoreError(
            f"{store.place} was scored when futures of valence ran from one document into the "
            "next; delete it, then type: raykd score RECIPE"
        )


def _class_prior(table: Table) -> dict[str, Any]:
    return {"classes": list(table.classes), "class_prior": list(table.class_counts)}


def _vocabulary(table: Table) -> dict[str, Any]:
    """Size and digest of the tokens, which `data.vocabulary.check_digest` compares with others."""
    return {"vocabulary": {"size": len(table.classes), "sha256": table_digest(table.classes)}}


def _value_head_correlation(recipe: Recipe, rows: Rows, store: Store) -> float | None:
    rows = rows.take(store.places_of(rows.row_id, "val") >= 0)
    stored = store.column("valence", "val")
    mask = stored_steps(stored.steps, rows.mask)
    signal = torch.from_numpy(stored.padded(mask).astype(np.float32))
    document = documents_of(torch.from_numpy(np.array(rows.inputs)))
    realised, known = valence.realised_future(
        signal, torch.from_numpy(mask), recipe.valence.discount, document
    )
    at = known.numpy()
    predicted = store.column("trajectory", "val").padded(mask)[at].astype(np.float64)
    target = realised.numpy()[at].astype(np.float64)
    if not at.any() or predicted.std() == 0 or target.std() == 0:
        return None
    return float(np.corrcoef(predicted, target)[0, 1])
