"""Scoring: a teacher's signals for one shard of rows, as a table.

Plain torch; Ray only schedules it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd import data, models
from raykd.data import Rows
from raykd.errors import DataError, RecipeError
from raykd.files.digests import digest_of
from raykd.losses import valence
from raykd.models.adapter import Adapter, whole
from raykd.models.device import device_of
from raykd.recipe.recipe import Recipe
from raykd.signals import Signals, as_tensor, log_softmax
from raykd.store import layer_signals
from raykd.store.codecs import Codec
from raykd.store.codecs.hidden import Hidden, head_digest
from raykd.store.columns import encode, field
from raykd.store.commit import Shard
from raykd.store.logits import codec_for, codec_metadata
from raykd.teacher.identity import signals_of, store_identity, store_table
from raykd.techniques import register

HALF = torch.finfo(torch.float16).max
FAR = 0.02  # of the largest logit: above what bfloat16 rounds


class Scorer:
    """A teacher loaded once, ready for any shard."""

    def __init__(self, recipe: Recipe):
        assert recipe.teacher is not None
        self.recipe, self.device = recipe, device_of(recipe)
        self.dataset = data.load(recipe.data)
        register(recipe.technique)
        module = models.build_model(recipe.teacher, **self.dataset.shape, key="teacher")
        want = frozenset(signals_of(recipe))
        self.settings = store_table(recipe, len(self.dataset.classes))
        self.key = int(digest_of(store_identity(recipe, self.dataset))[:15], 16)
        self.head_inputs = (
            _watch_head(module, recipe.store.head) if self.settings["codec"] == "hidden" else None
        )
        self.codec = (
            _hidden_codec(module, recipe.store.head)
            if self.head_inputs is not None
            else codec_for(self.settings, len(self.dataset.classes))
        )
        self.teacher = Adapter(module, want=want).to(self.device).eval().requires_grad_(False)

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """RecipeError if the recipe's teacher cannot be loaded or does not fit its data.

        Call it before Ray is started, where the error would be wrapped and come late.
        """
        cls(recipe)

    def table(self, shard: Shard) -> pa.Table:
        """One row of signals for each row of the shard.

        DataError names rows that can not be scored.
        """
        table, bad = self.score(shard)
        if bad:
            raise DataError(bad_rows(bad, 0))
        return table

    def score(self, shard: Shard) -> tuple[pa.Table, dict[int, str]]:
        """(a row of signals for each row that the teacher can score, the other rows with the
        reason).
        """
        rows = self.dataset.splits[shard.split].take(slice(shard.first, shard.last))
        size, bad = self.recipe.store.batch, {}
        batches = [
            self._signals(rows.take(slice(i, i + size)), bad) for i in range(0, len(rows), size)
        ]
        encoded = pa.concat_arrays([b.pop("logits") for b in batches])
        arrays = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        return _to_table(
            rows.row_id[~np.isin(rows.row_id, list(bad))], arrays, self.codec, encoded
        ), bad

    @torch.inference_mode()
    def _signals(self, rows: Rows, bad: dict[int, str]) -> dict[str, Any]:
        """The arrays of a batch's rows; those that can not be stored are added to `bad` instead."""
        mask = as_tensor(rows.mask).to(self.device)
        signals = self._read(rows, mask)
        out = {"mask": signals.mask} | self._said(rows, signals) | self._valence(rows, signals)
        for name, values in signals.layers.items():
            out |= {
                name: values,
                layer_signals.steps_column(name): mask
                if values.shape[1] == mask.shape[1]
                else _all_steps(values),
            }
        arrays = {
            k: (v.half() if v.dim() > 1 and v.is_floating_point() else v).cpu().numpy()
            for k, v in out.items()
        }
        kept = signals.logits if self.head_inputs is None else self._head_input(signals)
        unfit = self._unfit(signals, kept, arrays)
        bad |= {int(rows.row_id[i]): reason for i, reason in unfit.items()}
        fit = np.setdiff1d(np.arange(len(rows)), list(unfit))
        if unfit:
            arrays = {k: v[fit] for k, v in arrays.items()}
            kept, signals = kept[fit], replace(signals, mask=signals.mask[fit])
        return arrays | {
            "logits": self.codec.encode(kept, signals.mask, rows.row_id[fit], self.key)
        }

    def _read(self, rows: Rows, mask: Tensor) -> Signals:
        """What the teacher says of rows, with a column for each class: those behind them are
        padding of its head.
        """
        if self.head_inputs is not None:
            self.head_inputs.clear()
        signals, classes = (
            self.teacher(as_tensor(rows.inputs).to(self.device), mask),
            len(self.dataset.classes),
        )
        if signals.logits.shape[-1] < classes:
            raise RecipeError(
                f"teacher: answers with {signals.logits.shape[-1]} classes, and the data have {classes}; name a "
                "teacher of these data"
            )
        return replace(signals, logits=signals.logits[..., :classes])

    def _head_input(self, signals: Signals) -> Tensor:
        """(B, T, D): what the head read. RecipeError if the logits are not its bare answer."""
        assert self.head_inputs is not None
        found = whole(self.teacher.module, self.head_inputs)
        head: Any = self.teacher.module.get_submodule(self.recipe.store.head)
        said = signals.logits[:1, :1]
        z = nn.functional.linear(found[:1, :1], head.weight, head.bias)[..., : said.shape[-1]]
        if (z - said).abs().max() > FAR * said.abs().max():
            raise RecipeError(
                f"store.head {self.recipe.store.head!r}: the teacher changes that layer's answer into other logits, so "
                'it can not stand for them; use another codec, such as store.codec = "comb"'
            )
        return found

    def _said(self, rows: Rows, signals: Signals) -> dict[str, Tensor]:
        """The teacher's class of each row; of text its likeliest token at each step, and log p of
        the true one.
        """
        if not rows.is_text:
            return {"answer": signals.sequence_logits().argmax(1)}
        true = as_tensor(rows.label).to(self.device).clamp(min=0).unsqueeze(-1)
        return {
            "answer": signals.logits.argmax(2),
            "log_p": log_softmax(signals.logits).gather(2, true).squeeze(2),
        }

    def _unfit(
        self, signals: Signals, kept: Tensor, arrays: dict[str, NDArray[Any]]
    ) -> dict[int, str]:
        """The places in the batch of rows with an answer that can not be stored at some valid step,
        and why.
        """
        mask = signals.mask.cpu().numpy()
        is_half = self.settings["codec"] == "hidden" or self.settings.get("values") == "fp16"
        finite: dict[str, Any] = {
            "NaN or infinite logits": torch.isfinite(signals.logits).all(2).cpu().numpy()
        }
        if is_half:
            finite["logits or hidden states that fp16 can not hold"] = (
                (kept.abs() <= HALF).all(2).cpu().numpy()
            )
        bad = {reason: (~sound & mask).any(1) for reason, sound in finite.items()}
        for name in filter(layer_signals.is_signal, arrays):
            sound = np.isfinite(arrays[name]).reshape(*arrays[name].shape[:2], -1).all(2)
            bad[f"{name} has values that fp16 can not hold"] = (
                ~sound & arrays[layer_signals.steps_column(name)]
            ).any(1)
        found: dict[int, str] = {}
        for reason, rows in bad.items():
            found = {int(i): reason for i in np.flatnonzero(rows)} | found
        return found

    def _valence(self, rows: Rows, signals: Signals) -> dict[str, Tensor]:
        """Valence per step, the teacher's future-valence trajectory, its certainty and the row's
        saliency.
        """
        settings = self.recipe.valence
        steps, label = signals.mask, as_tensor(rows.label).to(self.device)
        if settings.source == "column":
            if rows.valence is None:
                raise DataError(
                    'valence.source = "column", but the data has none; name it in data.columns.valence'
                )
            values, steps = (
                as_tensor(rows.valence).to(self.device),
                as_tensor(rows.mask).to(self.device),
            )
        else:
            values = valence.prefix_confidence(signals.logits, steps, label)
        trajectory, known = valence.realised_future(values, steps, settings.discount)
        if signals.valence is not None:
            trajectory = signals.valence
        certainty = valence.coherence(signals.logits, signals.mask, settings.certainty)
        return {
            "valence": values,
            "trajectory": trajectory,
            "valence_mask": steps,
            "coherence": certainty,
            "saliency": valence.saliency(trajectory, known, certainty, settings),
        }


def _all_steps(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)


def _watch_head(module: nn.Module, name: str) -> list[Tensor]:
    """A list that every input of the submodule `name` is added to."""
    named, kept = dict(module.named_modules()), []
    if not isinstance(named.get(name), nn.Linear):
        raise RecipeError(
            f"store.head {name!r}: the teacher has no linear layer of that name; it has {', '.join(named)}"
        )
    named[name].register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    return kept


def _hidden_codec(module: nn.Module, name: str) -> Hidden:
    head = dict(module.named_modules())[name]
    assert isinstance(head, nn.Linear)
    return Hidden(head.in_features, head_digest(head.weight, head.bias))


def _to_table(
    row_id: NDArray[np.int64], arrays: dict[str, NDArray[Any]], codec: Codec, encoded: pa.Array
) -> pa.Table:
    inner = {
        k: (arrays.pop(k), arrays.pop(layer_signals.steps_column(k)))
        for k in [n for n in arrays if layer_signals.is_signal(n)]
    }
    masks = {"steps": arrays.pop("mask"), "valence_steps": arrays.pop("valence_mask")}
    columns: dict[pa.Field, Any] = {pa.field("row_id", pa.int64()): row_id}
    columns |= {pa.field(k, pa.int32()): m.sum(1).astype(np.int32) for k, m in masks.items()}
    packed, layout = codec.pack(encoded, masks["steps"].sum(1))
    columns[
        pa.field("logits", packed.type, nullable=False, metadata=codec_metadata(codec, layout))
    ] = packed
    for name, values in arrays.items():
        if values.ndim == 1:
            kind = np.int32 if name == "answer" else np.float32
            columns[pa.field(name, pa.from_numpy_dtype(kind))] = values.astype(kind)
        else:
            steps = "valence_steps" if name in ("valence", "trajectory") else "steps"
            columns[field(name, values, steps)] = encode(values, masks[steps])
    for name, (values, mask) in inner.items():
        columns[pa.field(layer_signals.steps_column(name), pa.int32())] = mask.sum(1).astype(
            np.int32
        )
        columns[field(name, values, "steps")] = encode(values, mask)
    return pa.table(list(columns.values()), schema=pa.schema(list(columns)))


def bad_rows(bad: dict[int, str], most: int) -> str:
    """What a user is told of rows that the teacher can not score."""
    lines = [f"  row {row_id}: {reason}" for row_id, reason in sorted(bad.items())[:10]]
    more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
    head = f"the teacher can not score {len(bad)} rows, scale.max_bad_rows allows {most}:"
    return "\n".join(
        [
            head,
            *lines,
            *more,
            "mend them or the teacher, or raise scale.max_bad_rows to leave them out",
        ]
    )
