"""Scoring: a teacher's signals for one shard of rows, as a table.

Plain torch; Ray only schedules it. A scorer never has the data set: it gets the rows of one shard
at a time, and a header that says what all rows have in common.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data import Rows
from raykd.data.rows import Facts
from raykd.errors import DataError, RecipeError
from raykd.files.digests import digest_of
from raykd.losses import valence
from raykd.models.adapter import Adapter, whole_batch
from raykd.models.build import build_frozen
from raykd.models.device import device_of, on_device
from raykd.models.form import Form, set_matmul
from raykd.recipe.recipe import Recipe
from raykd.signals import Signals, as_tensor, documents_of, log_softmax
from raykd.store import columns, layer_signals
from raykd.store.codecs import Codec
from raykd.store.codecs.hidden import Hidden, head_digest
from raykd.store.logits import codec_for, codec_metadata
from raykd.teacher.identity import signals_of, store_identity, store_table
from raykd.teacher.sums import sums_of
from raykd.techniques import register

HALF = torch.finfo(torch.float16).max
SHOWN = 10  # bad rows that a message lists
ROUNDED = 3  # times the rounding of a dtype: what a head's answers may be apart
LEAST_FAR = 1e-3  # of a row's largest logit: what other orders of a sum come to
BESIDE_BYTES = 1 << 28  # of a batch's logits: those of more are not held beside the next batch's
PIECE_BYTES = 1 << 28  # of logits that are made at a time of a head that is left out


@dataclass(frozen=True)
class Header:
    """What a teacher must know of rows that it has not seen yet.

    `shape` has the sizes that a model is built for, and `key` keys the codec's draws.
    """

    shape: dict[str, int]  # channels, classes and steps
    is_text: bool
    key: int
    in_parts: bool = False  # then each shard's sums are kept beside it

    @classmethod
    def of(cls, recipe: Recipe, rows: Facts) -> "Header":
        """The header of a recipe's rows."""
        key = int(digest_of(store_identity(recipe, rows))[:15], 16)
        return cls(rows.shape, rows.is_text, key, rows.in_parts)

    @property
    def classes(self) -> int:
        return self.shape["classes"]


@dataclass(frozen=True)
class Answer:
    """What the teacher says of a batch; with the codec `hidden` also what its head was given."""

    signals: Signals
    head_input: Tensor | None

    def rows(self, at: slice) -> "Answer":
        """The rows at `at` alone."""
        hidden = self.head_input
        return Answer(self.signals.rows(at), None if hidden is None else hidden[at])


class Scorer:
    """A teacher loaded once, ready for the rows of any shard."""

    def __init__(self, recipe: Recipe, header: Header):
        assert recipe.teacher is not None
        self.recipe = recipe
        self.header = header
        self.device = device_of(recipe)
        register(recipe.technique)
        set_matmul(recipe.precision)
        want = frozenset(signals_of(recipe))
        form = Form.of_teacher(recipe.precision, self.device, want)
        module = build_frozen(recipe.teacher, header.shape, form, key="teacher")
        self.settings = store_table(recipe, header.classes)
        self.head_inputs: list[Tensor] | None = None
        if self.settings["codec"] == "hidden":
            self.head_inputs = _watch_head(module, recipe.store.head)
            self.codec: Codec = _hidden_codec(module, recipe.store.head)
        else:
            self.codec = codec_for(self.settings, header.classes)
        self.teacher = Adapter(module, want=want, dtype=form.dtype).eval().requires_grad_(False)
        self.is_known = not self.teacher.heads()  # whether its head has been looked for

    @classmethod
    def check(cls, recipe: Recipe, header: Header) -> None:
        """RecipeError if the recipe's teacher cannot be loaded or does not fit its data.

        Call it before Ray is started, where the error would be wrapped and come late.
        """
        cls(on_device(recipe, "cpu"), header)

    def table(self, rows: Rows) -> pa.Table:
        """One row of signals for each row of a shard.

        DataError names rows that cannot be scored.
        """
        table, bad = self.score(rows)
        if bad:
            raise DataError(bad_rows(bad, 0))
        return table

    def score(self, rows: Rows) -> tuple[pa.Table, dict[int, str]]:
        """(a row of signals for each row that can be scored, {row id: reason} of the others)."""
        bad: dict[int, str] = {}
        batches = list(self._batches(rows, bad))
        encoded = pa.concat_arrays([batch.pop("logits") for batch in batches])
        arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        row_id = rows.row_id[~np.isin(rows.row_id, list(bad))]
        return _to_table(row_id, arrays, codec=self.codec, encoded=encoded), bad

    def sums(self, table: pa.Table, rows: Rows, split: str) -> dict[str, Any] | None:
        """What a scored shard adds to the statistics, as JSON; None where those are taken of all
        rows together.
        """
        if not self.header.in_parts:
            return None
        return sums_of(table, rows, split, self.recipe.valence.discount).told()

    def _batches(self, rows: Rows, bad: dict[int, str]) -> Iterator[dict[str, Any]]:
        """The arrays of each batch's rows.

        While a thread encodes a batch, the teacher reads the next. No more than these two are
        held, and of large answers one. The logits of a large head are made for some rows at a time.
        """
        size = self.recipe.store.batch
        # torch counts threads per thread, and sums depend on the count
        numbers = (torch.get_num_threads(),)
        with ThreadPoolExecutor(1, "encode", torch.set_num_threads, numbers) as thread:
            before: Future[list[dict[str, Any]]] | None = None
            for first in range(0, len(rows), size):
                batch = rows.take(slice(first, first + size))
                answer = self._forward(batch)
                if before:
                    yield from before.result()
                before = thread.submit(self._encoded, batch, answer, bad)
                if answer.signals.headed is None and answer.signals.logits.nbytes > BESIDE_BYTES:
                    wait([before])
            if before:
                yield from before.result()

    def _encoded(self, rows: Rows, answer: Answer, bad: dict[int, str]) -> list[dict[str, Any]]:
        """The arrays of a batch's rows, in as many pieces as its logits are made in."""
        count = len(rows)
        if answer.signals.headed is not None:
            a_row = 4 * answer.signals.mask.shape[1] * answer.signals.columns
            count = max(1, PIECE_BYTES // a_row)
        pieces = [slice(first, first + count) for first in range(0, len(rows), count)]
        return [self._signals(rows.take(at), answer.rows(at), bad) for at in pieces]

    @torch.inference_mode()
    def _signals(self, rows: Rows, answer: Answer, bad: dict[int, str]) -> dict[str, Any]:
        """The arrays of a batch's rows; rows that cannot be stored are added to `bad` instead."""
        mask = as_tensor(rows.mask).to(self.device)
        signals = answer.signals
        values = {"mask": signals.mask}
        values |= self._answers(rows, signals)
        values |= self._valence(rows, signals)
        for name, layer in signals.layers.items():
            has_all_steps = layer.shape[1] == mask.shape[1]
            values[name] = layer
            values[layer_signals.steps_column(name)] = mask if has_all_steps else _all_steps(layer)
        arrays = {name: _to_numpy(tensor) for name, tensor in values.items()}
        stored = signals.logits
        if answer.head_input is not None:
            self._check_bare(answer.head_input, signals)
            stored = answer.head_input
        mask = signals.mask
        unfit = self._unfit(signals, stored, arrays)
        bad |= {int(rows.row_id[i]): reason for i, reason in unfit.items()}
        fit = np.setdiff1d(np.arange(len(rows)), list(unfit))
        if unfit:
            arrays = {name: array[fit] for name, array in arrays.items()}
            stored = stored[fit]
            mask = mask[fit]
        return arrays | {
            "logits": self.codec.encode(stored, mask, rows.row_id[fit], self.header.key)
        }

    @torch.inference_mode()
    def _forward(self, rows: Rows) -> Answer:
        """The teacher's answer, with a column for each class: columns beyond them are padding."""
        if self.head_inputs is not None:
            self.head_inputs.clear()
        mask = as_tensor(rows.mask).to(self.device)
        inputs = as_tensor(rows.inputs).to(self.device)
        if not self.is_known:
            self.teacher.find_head(inputs[:1], mask[:1])
            self.is_known = True
        signals = self.teacher(inputs, mask)
        classes = self.header.classes
        if signals.columns < classes:
            raise RecipeError(
                f"teacher: answers with {signals.columns} classes, and the data have "
                f"{classes}; name a teacher of these data"
            )
        signals = signals.first_columns(classes)
        head_input = None
        if self.head_inputs is not None:
            if not self.head_inputs:
                raise self._head_refused("the teacher does not call that layer")
            # of a module that reads a batch in parts only its latest one can be joined
            head_input = whole_batch(self.teacher.module, self.head_inputs)
            if head_input.dim() == 2:  # of a teacher that answers once a row
                head_input = head_input.unsqueeze(1)
            if head_input.shape[:2] != signals.mask.shape:
                raise self._head_refused(
                    f"that layer gets {tuple(head_input.shape)}, and the teacher answers at "
                    f"{tuple(signals.mask.shape)}"
                )
        return Answer(signals, head_input)

    def _check_bare(self, hidden: Tensor, signals: Signals) -> None:
        """RecipeError if the logits are not the head's bare answer to its inputs (B, T, D), at any
        step that can be stored.
        """
        for logits, states, mask in zip(signals.logits, hidden, signals.mask, strict=True):
            at = mask & logits.isfinite().all(1)
            if at.any() and not self._is_bare(logits[at], states[at]):
                raise self._head_refused("the teacher changes that layer's answer into others")

    def _is_bare(self, logits: Tensor, states: Tensor) -> bool:
        """Whether P logits of one row are what the head says of P hidden states, up to rounding."""
        answer = self._head_answer(states)
        rounding = max(torch.finfo(t.dtype).eps for t in (answer, logits))
        far = max(ROUNDED * rounding, LEAST_FAR)
        return bool((answer - logits).abs().max() <= far * logits.abs().max())

    def _head_answer(self, states: Tensor) -> Tensor:
        """(P, C): what the head alone says of P hidden states."""
        head: Any = self.teacher.module.get_submodule(self.recipe.store.head)
        classes = self.header.classes
        bias = None if head.bias is None else head.bias[:classes]
        return nn.functional.linear(states, head.weight[:classes], bias)

    def _head_refused(self, what: str) -> RecipeError:
        return RecipeError(
            f"store.head {self.recipe.store.head!r}: {what}, so its input cannot stand for them; "
            'use another codec, such as store.codec = "comb"'
        )

    def _answers(self, rows: Rows, signals: Signals) -> dict[str, Tensor]:
        """The teacher's class of each row.

        For text, its likeliest token at each step and log p of the true one.
        """
        if not rows.is_text:
            return {"answer": signals.sequence_logits().argmax(1)}
        true = as_tensor(rows.label).to(self.device).clamp(min=0).unsqueeze(-1)
        return {
            "answer": signals.logits.argmax(2),
            "log_p": log_softmax(signals.logits).gather(2, true).squeeze(2),
        }

    def _unfit(
        self, signals: Signals, stored: Tensor, arrays: dict[str, NDArray[Any]]
    ) -> dict[int, str]:
        """{place in the batch: reason} of the rows that cannot be stored at some valid step."""
        mask = signals.mask.cpu().numpy()
        is_half = self.settings["codec"] == "hidden" or self.settings.get("values") == "fp16"
        finite: dict[str, Any] = {
            "NaN or infinite logits": torch.isfinite(signals.logits).all(2).cpu().numpy()
        }
        if is_half:
            fits = (stored.abs() <= HALF).all(2).cpu().numpy()
            finite["logits or hidden states that fp16 cannot hold"] = fits
        bad = {reason: (~sound & mask).any(1) for reason, sound in finite.items()}
        if signals.valence is not None:
            sound = np.isfinite(arrays["trajectory"]) | ~arrays["valence_mask"]
            bad["NaN or infinite valence of the value head"] = (~sound).any(1)
        for name in filter(layer_signals.is_signal, arrays):
            values = arrays[name]
            sound = np.isfinite(values).reshape(*values.shape[:2], -1).all(2)
            unsound = ~sound & arrays[layer_signals.steps_column(name)]
            bad[f"{name} has values that fp16 cannot hold"] = unsound.any(1)
        unfit: dict[int, str] = {}
        for reason, rows in bad.items():  # the first reason of a row counts
            unfit = {int(i): reason for i in np.flatnonzero(rows)} | unfit
        return unfit

    def _valence(self, rows: Rows, signals: Signals) -> dict[str, Tensor]:
        """The valence of each step, its future as the teacher sees it, certainty and saliency.

        A future is NaN where it is unknown.
        """
        settings = self.recipe.valence
        steps = signals.mask
        label = as_tensor(rows.label).to(self.device)
        if settings.source == "column":
            if rows.valence is None:
                raise DataError(
                    'valence.source = "column", but the data has none; name it in '
                    "data.columns.valence"
                )
            values = as_tensor(rows.valence).to(self.device)
            steps = as_tensor(rows.mask).to(self.device)
        else:
            values = valence.prefix_confidence(signals.logits, steps, label)
            if signals.valence is not None and values.shape != signals.valence.shape:
                steps = signals.valence_steps
                values = valence.at_last_step(values, steps)
        document = documents_of(as_tensor(rows.inputs).to(self.device))
        trajectory, known = valence.realised_future(values, steps, settings.discount, document)
        trajectory = torch.where(known, trajectory, torch.nan)
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


def _to_numpy(values: Tensor) -> NDArray[Any]:
    """An array; floating-point values of steps as fp16."""
    if values.dim() > 1 and values.is_floating_point():
        values = values.half()
    return values.cpu().numpy()


def _all_steps(values: Tensor) -> Tensor:
    """(B, T): True at every step of a layer's values (B, T, ...)."""
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)


def _watch_head(module: nn.Module, name: str) -> list[Tensor]:
    """A list to which every input of the submodule `name` is added."""
    named = dict(module.named_modules())
    if not isinstance(named.get(name), nn.Linear):
        raise RecipeError(
            f"store.head {name!r}: the teacher has no linear layer of that name; "
            f"it has {', '.join(named)}"
        )
    inputs: list[Tensor] = []
    named[name].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    return inputs


def _hidden_codec(module: nn.Module, name: str) -> Hidden:
    head = dict(module.named_modules())[name]
    assert isinstance(head, nn.Linear)
    bias = None if head.bias is None else head.bias.float()
    return Hidden(head.in_features, head_digest(head.weight.float(), bias))


def _to_table(
    row_id: NDArray[np.int64],
    arrays: dict[str, NDArray[Any]],
    *,
    codec: Codec,
    encoded: pa.Array,
) -> pa.Table:
    """A shard's table: row ids, counts of steps, encoded logits, then the other signals."""
    layers = {}
    for name in [name for name in arrays if layer_signals.is_signal(name)]:
        layers[name] = (arrays.pop(name), arrays.pop(layer_signals.steps_column(name)))
    masks = {"steps": arrays.pop("mask"), "valence_steps": arrays.pop("valence_mask")}
    fields: dict[pa.Field, Any] = {pa.field("row_id", pa.int64()): row_id}
    for name, mask in masks.items():
        fields[pa.field(name, pa.int32())] = _counts(mask)
    packed, layout = codec.pack(encoded, masks["steps"].sum(1))
    metadata = codec_metadata(codec, layout)
    fields[pa.field("logits", packed.type, nullable=False, metadata=metadata)] = packed
    for name, values in arrays.items():
        if values.ndim == 1:
            dtype = np.int32 if name == "answer" else np.float32
            fields[pa.field(name, pa.from_numpy_dtype(dtype))] = values.astype(dtype)
        else:
            steps = "valence_steps" if name in ("valence", "trajectory") else "steps"
            fields[columns.field(name, values, steps)] = columns.encode(values, masks[steps])
    for name, (values, mask) in layers.items():
        fields[pa.field(layer_signals.steps_column(name), pa.int32())] = _counts(mask)
        fields[columns.field(name, values, "steps")] = columns.encode(values, mask)
    return pa.table(list(fields.values()), schema=pa.schema(list(fields)))


def _counts(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(N,): the valid steps of each row."""
    return mask.sum(1).astype(np.int32)


def bad_rows(bad: dict[int, str], most: int) -> str:
    """The message about rows that the teacher cannot score, of which `most` are allowed."""
    lines = [f"the teacher cannot score {len(bad)} rows, scale.max_bad_rows allows {most}:"]
    lines += [f"  row {row_id}: {reason}" for row_id, reason in sorted(bad.items())[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    lines.append("mend them or the teacher, or raise scale.max_bad_rows to leave them out")
    return "\n".join(lines)
