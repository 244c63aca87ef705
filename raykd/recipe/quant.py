"""How a layer is quantised, as data: levels, scales, what shares one, and what is left alone.

Needs no torch.

    weights    codes        scale of a group                     executed by
    int8       -127..127    max|W| / 127                         MatMulInteger, activations 8 bits
    int4       -7..7        max|W| / 7                           MatMulNBits, 4 bits
    ternary    -1..1        mean|W| (arXiv 2402.17764)           MatMulNBits, 2 bits

`per` says which weights share a scale: all of a layer ("tensor"), those of one output ("channel"),
or `group` neighbouring inputs of one output ("group"). A layer whose inputs no group divides takes
"channel".

Activations are rounded as the operator rounds them. "int8": before MatMulInteger over the whole
call, in MatMulNBits over each block of a row's inputs, a block being a group, or without groups
`Quant.block`. "int8_token", for int8 weights: over each row's inputs, so that no answer depends on
the other rows of its call.

`embeddings` are tables that GatherBlockQuantized executes, with the codes and the scale of the
table above. A row has scales of its own: one, or with `per = "group"` one for each group.
"""

from fnmatch import fnmatch
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

Weights = Literal["int8", "int4", "ternary"]
LEVELS: dict[str, int] = {"int8": 127, "int4": 7, "ternary": 1}  # the largest code
BITS: dict[str, int] = {"int8": 8, "int4": 4, "ternary": 2}  # of a stored code
SCALES = {"int8": "absmax", "int4": "absmax", "ternary": "absmean"}
# Blocks of MatMulNBits. With 2 bits onnxruntime 1.32 rounds no activations in blocks of 16 or 256.
BLOCKS = (32, 64, 128)
GROUP = 32
# The first onnxruntime that executes every scheme: GatherBlockQuantized of bytes came with 1.23,
# MatMulNBits of 2 bits with 1.24, GatherBlockQuantized of 2 bits with 1.27; and MatMulNBits of 2
# bits rounds activations from this one on.
ONNXRUNTIME = "1.28"


class Quant(BaseModel):
    """One quantisation of a model's layers.

    `skip` holds patterns of the names of layers that stay as they are. `rest` says how every other
    parameter that is not a vector is stored: skipped layers, convolutions, positions. Under "int8"
    it is rounded with a scale for each slice of its first dimension, and computed in float32.

    Example:
        >>> quant = Quant(weights="int4", per="group")
        >>> quant.columns(inputs=64), quant.skips("lm_head"), quant.over_the_call
        (32, True, False)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weights: Weights = "int8"
    """The levels that weights are rounded to."""
    per: Literal["tensor", "channel", "group"] = "channel"
    """Which weights share a scale: a layer's, an output's, or `group` inputs of an output."""
    group: Literal[16, 32, 64, 128] = GROUP
    """Of `per = "group"`: neighbouring inputs that share a scale."""
    scale: Literal["absmax", "absmean", "twn", "learned"] | None = None
    """How a scale is found; without it absmean for ternary weights, absmax for others."""
    activations: Literal["int8", "int8_token", "none"] = "int8"
    """How activations are rounded: over a call, over each row's inputs, or not."""
    embeddings: Weights | Literal["none"] = "none"
    """The levels that tables of embeddings are rounded to."""
    skip: list[str] = ["head", "value", "*.head", "lm_head"]
    """Patterns of the names of layers that are not rounded."""
    rest: Literal["int8", "fp32"] = "int8"
    """How every other parameter that is not a vector is stored."""

    @model_validator(mode="after")
    def _executable(self) -> "Quant":
        if self.scale in ("absmean", "twn") and self.weights != "ternary":
            raise ValueError(
                f'scale = "{self.scale}" is a rule for weights = "ternary", found {self.weights!r}'
            )
        if self.group != GROUP and self.per != "group":
            raise ValueError(f'group = {self.group} needs per = "group", found {self.per!r}')
        if self.weights == "int8" and self.per == "group":
            raise ValueError(
                'per = "group" has no runtime for int8 weights; write "channel" or "tensor"'
            )
        if self.weights == "int8" and self.activations == "none":
            raise ValueError(
                'int8 weights are multiplied with int8 activations; write activations = "int8"'
            )
        if self.weights != "int8" and self.activations == "int8_token":
            raise ValueError(
                f"{self.weights} weights round activations row by row as it is; write "
                'activations = "int8"'
            )
        in_sixteens = self.per == "group" and self.group == 16
        if self.weights == "ternary" and in_sixteens and self.activations == "int8":
            raise ValueError(
                "no runtime rounds activations in groups of 16; write group = 32 or "
                'activations = "none"'
            )
        return self

    @property
    def rule(self) -> str:
        """How a scale is found."""
        return self.scale or SCALES[self.weights]

    @property
    def over_the_call(self) -> bool:
        """Whether activations are rounded over a whole call.

        An answer then depends on the other rows of its call.
        """
        return self.weights == "int8" and self.activations == "int8"

    def columns(self, inputs: int) -> int:
        """How many inputs of one output share a scale."""
        return self.group if self.per == "group" and inputs % self.group == 0 else inputs

    def block(self, inputs: int) -> int:
        """Inputs to a block of MatMulNBits: a group, or, where an output has one scale, the block
        that takes the fewest bytes.
        """
        if self.columns(inputs) < inputs:
            return self.group

        def stored_bytes(size: int) -> int:
            blocks = -(-inputs // size)
            return blocks * (size * BITS[self.weights] // 8 + 4)

        return min(BLOCKS, key=stored_bytes)

    def skips(self, name: str) -> bool:
        """Whether a layer of this name is left as it is."""
        return any(fnmatch(name, pattern) for pattern in self.skip)
