"""A teacher like a language model: a small neural one mixed with Witten-Bell 4-grams, and a
sharpened version of it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from pipelines.bench.corpus import CONTEXT, STEPS, VOCAB, Corpus
from pipelines.bench.language import Language, Windows, fit_text
from raykd.files.atomic import write_bytes
from raykd.store.codecs.layout import ragged

FLAT_BITS = 4.9
SHARP_BITS = 1.84
TEACHER = {"width": 192, "layers": 3, "heads": 3}
STUDENT = {"width": 64, "layers": 2, "heads": 2}


class NGrams:
    """Witten-Bell: p_n(w | h) = (count(h w) + kinds(h) p_{n-1}(w | h')) / (count(h) + kinds(h)),
    down to 1 / V.
    """

    def __init__(self, tokens: NDArray[np.int64], order: int = CONTEXT + 2):
        self.order = order
        self.keys = []
        self.counts = []
        for n in range(1, order + 1):
            key = np.zeros(len(tokens) - n + 1, np.int64)
            for i in range(n):
                key = key * VOCAB + tokens[i : len(tokens) - n + 1 + i]
            keys, counts = np.unique(key, return_counts=True)
            self.keys.append(keys)
            self.counts.append(np.concatenate([[0], np.cumsum(counts)]))

    def probabilities(self, context: NDArray[np.int64]) -> NDArray[np.float32]:
        """(P, V): what follows each context (P, order - 1)."""
        p = np.full((len(context), VOCAB), 1 / VOCAB, np.float32)
        for n in range(self.order):
            prefix = np.zeros(len(context), np.int64)
            for token in context[:, self.order - 1 - n :].T:
                prefix = prefix * VOCAB + token
            first, last = (np.searchsorted(self.keys[n], (prefix + i) * VOCAB) for i in (0, 1))
            kinds = last - first
            total = self.counts[n][last] - self.counts[n][first]
            scale = 1 / np.maximum(total + kinds, 1)
            p *= np.where(total > 0, kinds * scale, 1)[:, None].astype(np.float32)
            entry = ragged(first, kinds)
            row = np.repeat(np.arange(len(context)), kinds)
            p[row, self.keys[n][entry] % VOCAB] += np.diff(self.counts[n])[entry] * scale[row]
        return p


def neural(corpus: Corpus, out: Path, *, steps: int) -> Language:
    """The neural teacher after `steps` steps of 1024 tokens, trained once into the folder `out`."""
    model = Language(VOCAB, STEPS, **TEACHER)
    text = Windows(corpus.train, STEPS, batch=8, seed=0)
    return _once(
        model,
        out,
        f"teacher-{corpus.digest}",
        steps,
        lambda: fit_text(model, text, steps=steps, rate=3e-3),
    )


def warm_student(corpus: Corpus, out: Path, *, steps: int) -> Language:
    """The student that every distillation starts from, after `steps` steps of 512 tokens of plain
    text.
    """
    model = Language(VOCAB, STEPS, **STUDENT)
    text = Windows(corpus.train, STEPS, batch=4, seed=1)
    return _once(
        model,
        out,
        f"student-{corpus.digest}",
        steps,
        lambda: fit_text(model, text, steps=steps, rate=3e-3),
    )


def _once(model: Language, out: Path, name: str, steps: int, fit: Callable[[], None]) -> Language:
    """`model` as trained before, or by `fit` from the initial weights of one seed."""
    shape = json.dumps([steps, {k: list(v.shape) for k, v in model.state_dict().items()}])
    path = out / f"{name}-{hashlib.sha256(shape.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
        fit()
        write_bytes(path, save(model.state_dict()))
    model.load_state_dict(load_file(path))
    return model


class Mixture:
    """share p_neural + (1 - share) p_n-gram, whose share gives it FLAT_BITS bits of entropy on the
    rows it is tuned on.

    `sharpening` is the factor on its log-probabilities that leaves SHARP_BITS.
    """

    def __init__(self, grams: NGrams, model: Language, rows: NDArray[np.int64]):
        self.grams = grams
        self.model = model
        p, q = self._parts(rows)
        self.share = _bisect(lambda share: _bits(torch.lerp(p, q, share)), FLAT_BITS, 0.0, 1.0)
        log_p = torch.lerp(p, q, self.share).log()
        self.sharpening = _bisect(
            lambda factor: -_bits((log_p * factor).softmax(2)), -SHARP_BITS, 1.0, 8.0
        )

    @torch.no_grad()
    def logits(self, rows: NDArray[np.int64]) -> Tensor:
        """(R, T, V) fp16: log-probabilities at every step of `rows` (R, CONTEXT + T + 1)."""
        out = torch.empty(len(rows), STEPS, VOCAB, dtype=torch.float16)
        for i in range(0, len(rows), 8):
            out[i : i + 8] = torch.lerp(*self._parts(rows[i : i + 8]), self.share).log()
        return out

    @torch.no_grad()
    def _parts(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """What the n-grams and what the network say, each (R, T, V)."""
        windows = np.lib.stride_tricks.sliding_window_view(rows, CONTEXT + 1, axis=1)[:, :STEPS]
        q = self.model(torch.from_numpy(rows[:, CONTEXT:-1])).softmax(2)
        return torch.from_numpy(self.grams.probabilities(windows.reshape(-1, CONTEXT + 1))).view_as(
            q
        ), q


def _bits(p: Tensor) -> float:
    """The mean entropy of p (R, T, V)."""
    return float(torch.special.entr(p).sum(2).mean() / np.log(2))


def _bisect(rises: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a rising function reaches `wanted`, or the nearest end of the interval."""
    for _ in range(12):
        middle = (low + high) / 2
        if rises(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
