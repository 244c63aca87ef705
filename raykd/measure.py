"""What a model is worth on a split: its sequence logits, and the headline metrics of a classifier."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raykd.batches import DeviceRows

EVAL_BATCH = 1024


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


def classifier_metrics(logits: NDArray[np.float32], label: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and mean negative log-likelihood over the labelled rows."""
    known = label >= 0
    z, label = logits[known].astype(np.float64), label[known]
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    nll = -log_p[np.arange(len(label)), label]
    return {"accuracy": float((z.argmax(1) == label).mean()), "nll": float(nll.mean())}
