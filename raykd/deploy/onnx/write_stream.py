"""A causal encoder of series as one ONNX file that reads a window step by step, for onnxruntime.

    inputs             (B, S, K) float32         the new steps, any number of them
    past_tail          (B, K, kernel - 1)        the last inputs that the convolution still sees;
                                                 zeros at the start
    past_keys.<i>      (B, H, P, D) float32      what an earlier call gave for layer i; P = 0 at
                                                 the start
    past_values.<i>    the same
    logits             (B, S, C) float32         at every new step
    valence            (B, S)                    the same
    tail, keys.<i>, values.<i>                   for the next call

Every row has P steps before its new ones. Rounded layers are `operators`, as in every file that
raykd writes. Positions end at `steps`, as in the module: the metadata says where, and the operator
that looks them up refuses what is beyond. A new window starts from an empty past.
"""

import torch
from torch import Tensor, nn

from raykd.deploy.onnx.write import compact, traced
from raykd.deploy.onnx.write_decoder import STEPS, GrowingCache, names
from raykd.errors import Problem, RecipeError
from raykd.models.series_encoder import SeriesEncoder

# Of the example; the tracer takes 0 and 1 for constants
ROWS = 2
PAST = 2
COUNT = 2


class StreamState(GrowingCache):
    """Keys, values and tail that go in and out of a call."""

    def __init__(self, tail: Tensor, keys: list[Tensor], values: list[Tensor]):
        super().__init__(keys, values)
        self.tail = tail


class StreamStep(nn.Module):
    """An encoder without a state: new steps and past -> answers and the past of the next call."""

    def __init__(self, module: SeriesEncoder):
        super().__init__()
        self.module = module

    def forward(
        self, inputs: Tensor, tail: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        past = StreamState(tail, keys, values)
        answers = self.module(inputs, past)
        return answers["logits"], answers["valence"], past.tail, *past.keys, *past.values


def check(module: nn.Module) -> None:
    """RecipeError, under the key export.stream, if a module has no such file."""
    if not isinstance(module, SeriesEncoder):
        problem = (
            f"found a {type(module).__name__}, and only a SeriesEncoder hands on what it has read"
        )
    elif not module.blocks:
        problem = "found a student without a layer, which has no past to hand on"
    elif module.steps < PAST + COUNT:
        problem = f"found a window of {module.steps} steps; it takes {PAST + COUNT}"
    else:
        return
    raise RecipeError([Problem("export.stream", f"{problem}; write stream = false")])


def to_onnx(module: SeriesEncoder) -> bytes:
    """The file of an encoder, its layers rounded or not.

    The module is changed: its layers become what the runtime executes. RecipeError if it cannot be
    exported.
    """
    check(module)
    layers = len(module.blocks)
    steps = module.steps
    tail, keys, values = empty(module, ROWS, PAST)
    free = {
        "rows": torch.export.Dim("rows", min=1, max=65536),
        "past": torch.export.Dim("past", min=0, max=steps),
        "count": torch.export.Dim("count", min=1, max=steps),
    }
    grown = [{0: free["rows"], 2: free["past"]}] * layers
    kept = ["tail", *names(layers)]
    proto = traced(
        module,
        StreamStep(module),
        (torch.zeros(ROWS, COUNT, tail.shape[1]), tail, keys, values),
        input_names=["inputs", *(f"past_{name}" for name in kept)],
        output_names=["logits", "valence", *kept],
        dynamic_shapes=({0: free["rows"], 1: free["count"]}, {0: free["rows"]}, grown, grown),
    )
    file = compact(proto)
    file.metadata_props.add(key=STEPS, value=str(steps))
    return file.SerializeToString()


def empty(
    module: SeriesEncoder, rows: int, past: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Tail, keys and values of zeros, of `past` steps: what a window of `rows` rows starts from."""
    shape = (rows, module.heads, past, module.conv.out_channels // module.heads)
    # Separate tensors: the tracer takes one that is passed twice for one input.
    keys = [torch.zeros(shape) for _ in module.blocks]
    values = [torch.zeros(shape) for _ in module.blocks]
    return torch.zeros(rows, module.conv.in_channels, module.kernel - 1), keys, values
