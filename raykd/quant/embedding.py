"""Embeddings that look up a row's codes times its scales, exactly as the runtime does."""

import torch
from torch import Tensor, nn

from raykd.quant.rounding import Rounded, check_finite, codes_of, scale_of
from raykd.recipe.quant import LEVELS, SCALES, Quant


class QuantEmbedding(nn.Embedding):
    """A table (V, D) under a Quant's `embeddings`; None is full precision.

    Its parameter is nn.Embedding's, its `blend` that of a QuantLinear. Only rows that are looked up
    are rounded, because each has its own scales.
    """

    quant: Quant | None = None
    blend: float = 1.0

    @classmethod
    def of(cls, layer: nn.Embedding) -> "QuantEmbedding":
        """The same table, its parameter shared."""
        options = {"scale_grad_by_freq": layer.scale_grad_by_freq, "sparse": layer.sparse}
        rows, width = layer.weight.shape
        embedding = cls(rows, width, layer.padding_idx, _weight=layer.weight, **options)
        embedding.weight = layer.weight
        return embedding.train(layer.training)

    def set(self, quant: Quant | None) -> None:
        """Take up a Quant, full precision where its `embeddings` is "none".

        RecipeError if the table is not finite.
        """
        check_finite(self.weight, "weights")
        self.quant = quant if quant and quant.embeddings != "none" else None

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (...) -> (..., D)."""
        rows = super().forward(ids)
        return rows if self.quant is None or self.blend == 0 else self._rounded(rows).to(rows.dtype)

    def rounded(self) -> Tensor:
        """(V, D): the table that is looked up in, scale times codes, blended."""
        return self._rounded(self.weight)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(V, D) int8: what an artefact holds.

        RecipeError if training left weights that are not finite.
        """
        check_finite(self.weight, "weights")
        groups, rule, largest = self._grouped(self.weight)
        codes = codes_of(groups, scale_of(groups, rule, largest), rule, largest)
        return codes.flatten(-2).to(torch.int8)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """(V, G) float32: the scale of each row's groups; G = 1 without groups."""
        return scale_of(*self._grouped(self.weight)).squeeze(-1)

    def _rounded(self, rows: Tensor) -> Tensor:
        groups, rule, largest = self._grouped(rows)
        scale = scale_of(groups.detach(), rule, largest)
        rounded = Rounded.apply(groups, scale, rule, largest)
        rounded = rounded.flatten(-2)  # type: ignore[attr-defined]
        return rounded if self.blend == 1 else torch.lerp(rows.float(), rounded, self.blend)

    def _grouped(self, rows: Tensor) -> tuple[Tensor, str, int]:
        """Groups (..., G, D / G) of rows, and the rule and the largest code of their rounding."""
        assert self.quant is not None
        groups = rows.unflatten(-1, (-1, self.quant.columns(self.embedding_dim)))
        return groups, SCALES[self.quant.embeddings], LEVELS[self.quant.embeddings]
