"""A causal language model in plain PyTorch, of any width, and its training on tokens."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.RMSNorm(width)
        self.norm_out = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_in(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.down(F.gelu(self.up(self.norm_out(x))))


class Language(nn.Module):
    """Tokens (B, T) to logits (B, T, V); the head is the embedding."""

    def __init__(self, vocab: int, steps: int, *, width: int, layers: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.place = nn.Embedding(steps, width)
        self.norm_in = nn.RMSNorm(width)
        self.norm_out = nn.RMSNorm(width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head(self) -> Tensor:
        return self.embed.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T, D): what the head reads."""
        x = self.norm_in(self.embed(tokens)) + self.place.weight[: tokens.shape[1]]
        return self.norm_out(self.blocks(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hidden(tokens) @ self.head.T


class Windows:
    """Random windows of a stream of tokens, drawn by `seed`."""

    def __init__(self, tokens: NDArray[np.int64], steps: int, *, batch: int, seed: int):
        self.tokens = torch.from_numpy(tokens)
        self.steps = steps
        self.batch = batch
        self.draws = torch.Generator().manual_seed(seed)

    def __call__(self, _number: int) -> tuple[Tensor, Tensor]:
        """(B, T) tokens and the tokens after them."""
        first = torch.randint(
            len(self.tokens) - self.steps - 1, (self.batch, 1), generator=self.draws
        )
        window = self.tokens[first + torch.arange(self.steps + 1)]
        return window[:, :-1], window[:, 1:]


def fit(model: nn.Module, loss: Callable[[int], Tensor], *, steps: int, rate: float) -> None:
    """Minimise `loss(step)` by AdamW: a short warm-up, then a decay to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(
                1.0, (step + 1) / (0.1 * steps), 0.05 + math.cos(math.pi * step / steps / 2)
            )
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def next_token_loss(model: Language, tokens: Tensor, following: Tensor) -> Tensor:
    """The mean cross-entropy of the tokens that follow."""
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def fit_text(model: Language, text: Windows, *, steps: int, rate: float) -> None:
    """Train by next-token prediction."""
    fit(model, lambda step: next_token_loss(model, *text(step)), steps=steps, rate=rate)
