"""Any nn.Module as a source of Signals: its answer in whatever form, its inner layers by hooks."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.signals import Signals


@runtime_checkable
class KeepsAttention(Protocol):
    """A module that leaves its softmax rows (B, H, T, T) in `.attention` at every call while this is True."""

    keep_attention: bool


class Adapter(nn.Module):
    """`module` as a function (inputs (B, T, K), mask (B, T)) -> Signals.

    The module answers with logits (B, C) or (B, T, C), or a dict or object that holds `logits` and, if it has a
    value head, `valence` (B, T). `want` names inner layers: "hidden.<submodule>" is that submodule's output
    (B, T, D), "attention.<submodule>" the softmax rows (B, H, T, T) of an nn.MultiheadAttention or of any module
    that leaves them in `.attention` while its `.keep_attention` is True.
    """

    def __init__(self, module: nn.Module, *, want: frozenset[str] = frozenset()):
        super().__init__()
        self.module = module
        self.kept: dict[str, Tensor] = {}
        named = dict(module.named_modules())
        for name in sorted(want):
            kind, _, path = name.partition(".")
            if path not in named:
                raise RecipeError(
                    f"layer {path!r}: the module has no such submodule; it has {', '.join(filter(None, named))}"
                )
            self._watch(name, kind, named[path])

    def forward(self, inputs: Tensor, mask: Tensor) -> Signals:
        """Signals of a batch; per-sequence logits become one step."""
        self.kept.clear()
        answer = self.module(inputs)
        logits, valence = _field(answer, "logits"), _field(answer, "valence")
        if logits is None or logits.dim() not in (2, 3):
            raise RecipeError(f"{type(self.module).__name__} must answer with logits (B, C) or (B, T, C)")
        if logits.dim() == 2:
            logits, mask = logits.unsqueeze(1), torch.ones_like(mask[:, :1])
        hidden = {k.partition(".")[2]: v for k, v in self.kept.items() if k.startswith("hidden.")}
        attention = {k.partition(".")[2]: v for k, v in self.kept.items() if k.startswith("attention.")}
        return Signals(logits, mask, valence, hidden, attention)

    def _watch(self, name: str, kind: str, layer: nn.Module) -> None:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            self.kept[name] = read(module, output)

        if kind == "hidden":
            read = _first
        elif isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_pre_hook(_ask_for_maps, with_kwargs=True)
            read = _second
        elif isinstance(layer, KeepsAttention):
            layer.keep_attention = True
            read = _left
        else:
            raise RecipeError(
                f"layer {name!r}: a {type(layer).__name__} shows no attention; name an nn.MultiheadAttention or a "
                "module with .keep_attention and .attention"
            )
        layer.register_forward_hook(keep)


def _ask_for_maps(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"need_weights": True, "average_attn_weights": False}


def _field(answer: Any, name: str) -> Tensor | None:
    if isinstance(answer, Tensor):
        return answer if name == "logits" else None
    return answer.get(name) if isinstance(answer, dict) else getattr(answer, name, None)


def _first(_module: Any, output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _second(_module: Any, output: Any) -> Tensor:
    return output[1]


def _left(module: Any, _output: Any) -> Tensor:
    return module.attention
