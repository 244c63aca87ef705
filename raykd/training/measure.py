"""What a model says of a split: its predictions, at every place where one is to be told."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data import Rows
from raykd.losses.shared_terms import kd
from raykd.signals import flatten_valid
from raykd.training.device_rows import DeviceRows
from raykd.training.predictions import Places, Predictions, of_logits

EVAL_BATCH = 1024
LOGITS = 1 << 22  # of text, at once


def predictions(model: nn.Module, split: Rows, rows: DeviceRows) -> Predictions:
    """The model's predictions of a split, in eval mode; `rows` are its tensors.

    Of text where `rows` have the teacher's answers at temperature 1, with the KL to them.
    """
    return (
        told(model, split, rows)
        if split.is_text
        else of_logits(split, sequence_logits(model, rows))
    )


@torch.inference_mode()
def sequence_logits(model: nn.Module, rows: DeviceRows) -> NDArray[np.float32]:
    """(N, C): the mean logits over valid steps of every row, the model in eval mode."""
    training = model.training
    model.eval()
    parts = [
        model(rows.inputs[i : i + EVAL_BATCH].to(rows.device), rows.mask[i : i + EVAL_BATCH])
        .sequence_logits()
        .float()
        .cpu()
        for i in range(0, len(rows.inputs), EVAL_BATCH)
    ]
    model.train(training)
    return torch.cat(parts).numpy()


@torch.inference_mode()
def told(model: nn.Module, split: Rows, rows: DeviceRows) -> Predictions:
    """The predictions of a split of text."""
    training, parts, size = model.training, [], None
    model.eval()
    first = 0
    while first < len(rows.label):
        index = torch.arange(first, min(first + (size or 1), len(rows.label)), device=rows.device)
        parts.append(_told(model, rows, index))
        first += len(index)
        size = size or max(1, LOGITS // (rows.mask.shape[1] * parts[0].pop("classes")))
    model.train(training)
    answer, log_q, kl = (
        torch.cat([p[k] for p in parts]).cpu().numpy() for k in ("answer", "log_q", "kl")
    )
    places = Places.of(split)
    return Predictions(
        places.place, places.label, answer, log_q, kl if rows.teaches_logits else None
    )


def _told(model: nn.Module, rows: DeviceRows, index: Tensor) -> dict[str, Any]:
    batch = rows.batch(index)
    signals = model(batch.inputs, batch.mask)
    log_q = flatten_valid(signals.log_q, batch.mask)  # (P, V)
    label = batch.label[batch.mask]
    own = log_q.gather(1, label.clamp(min=0)[:, None])[:, 0]
    value = (
        kd(signals, batch, temperature=1.0).value[batch.mask]
        if rows.teaches_logits
        else torch.full_like(own, 0)
    )
    found = {
        "answer": log_q.argmax(1),
        "log_q": torch.where(label >= 0, own, torch.nan),
        "kl": value,
    }
    return found | {"classes": log_q.shape[1]}
