"""A causal language model as one ONNX file that continues from its past, for stock onnxruntime.

    tokens             (B, S) int64              the new ones, any number of them
    past_keys.<i>      (B, H_kv, P, D) float32   what an earlier call gave for layer i; P = 0 at
                                                 the start
    past_values.<i>    the same
    logits             (B, S, V) float32         at every new position: checking a draft needs all
    keys.<i>           (B, H_kv, P + S, D)       for the next call
    values.<i>         the same

Every row has P tokens before its new ones. Rounded layers are `operators`, as in every file that
raykd writes. Angles of positions are computed from P, so no table is stored; `steps` in the
metadata is the longest context.
"""

import torch
from torch import Tensor, nn

from raykd.deploy.onnx.write import compact, traced
from raykd.models.llama import Llama

STEPS = "steps"  # key of the metadata
# Of the example; the tracer takes 0 and 1 for constants
ROWS = 2
PAST = 3
COUNT = 2


class GrowingCache:
    """Keys and values (B, H, P, D) of each layer that go in and out of a call."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys = list(keys)
        self.values = list(values)
        self.length = keys[0].shape[2]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, T, D) -> those of all positions (B, H, P + T, D)."""
        self.keys[layer] = torch.cat([self.keys[layer], keys], 2)
        self.values[layer] = torch.cat([self.values[layer], values], 2)
        return self.keys[layer], self.values[layer]


class DecoderStep(nn.Module):
    """A Llama without a state: tokens and past -> logits and the past of the next call."""

    def __init__(self, module: Llama):
        super().__init__()
        self.module = module

    def forward(
        self, tokens: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        past = GrowingCache(keys, values)
        logits = self.module(tokens, past)["logits"]
        return logits, *past.keys, *past.values


def to_onnx(module: Llama) -> bytes:
    """The file of a Llama, its layers rounded or not.

    The module is changed: its layers become what the runtime executes. RecipeError if it cannot be
    exported.
    """
    settings = module.settings
    layers = settings["layers"]
    steps = settings["steps"]
    shape = (ROWS, settings["kv_heads"], PAST, settings["width"] // settings["heads"])
    # Separate tensors: the tracer takes one that is passed twice for one input.
    keys = [torch.zeros(shape) for _ in range(layers)]
    values = [torch.zeros(shape) for _ in range(layers)]
    free = {
        "rows": torch.export.Dim("rows", min=1, max=65536),
        "past": torch.export.Dim("past", min=0, max=steps),
        "count": torch.export.Dim("count", min=1, max=steps),
    }
    grown = [{0: free["rows"], 2: free["past"]}] * layers
    kept = names(layers)
    proto = traced(
        module,
        DecoderStep(module),
        (torch.zeros(ROWS, COUNT, dtype=torch.int64), keys, values),
        input_names=["tokens", *(f"past_{name}" for name in kept)],
        output_names=["logits", *kept],
        dynamic_shapes=({0: free["rows"], 1: free["count"]}, grown, grown),
    )
    file = compact(proto)
    file.metadata_props.add(key=STEPS, value=str(steps))
    return file.SerializeToString()


def names(layers: int) -> list[str]:
    """Names of every layer's keys, then values: as outputs, and after "past_" as inputs."""
    return [f"{kind}.{i}" for kind in ("keys", "values") for i in range(layers)]
