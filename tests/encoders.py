"""A small encoder under every scheme of rounding, for tests of what is written of it."""

import functools

import torch
from torch import nn

from raykd.deploy.onnx import write as write_onnx
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.swap import prepare, quantised
from raykd.recipe.quant import Quant

STEPS = 12
CHANNELS = 3
CLASSES = 5
SCHEMES = {
    "int8-tensor": Quant(weights="int8", per="tensor"),
    "int8-channel": Quant(weights="int8"),
    "int8-learned": Quant(weights="int8", scale="learned"),
    "int4-g32": Quant(weights="int4", per="group", activations="none"),
    "int4-g64": Quant(weights="int4", per="group", group=64, activations="none"),
    "int4-learned": Quant(weights="int4", per="group", scale="learned", activations="none"),
    "int4-g32-int8": Quant(weights="int4", per="group"),
    "int4-channel-int8": Quant(weights="int4"),
    "ternary-tensor": Quant(weights="ternary", per="tensor", activations="none"),
    "ternary-channel": Quant(weights="ternary", activations="none"),
    "ternary-g16": Quant(weights="ternary", per="group", group=16, activations="none"),
    "ternary-twn": Quant(weights="ternary", scale="twn", activations="none"),
    "ternary-learned": Quant(weights="ternary", scale="learned", activations="none"),
    "ternary-channel-int8": Quant(weights="ternary"),
    "ternary-g32-int8": Quant(weights="ternary", per="group"),
}


def rounding(module: nn.Module, quant: Quant) -> nn.Module:
    prepare(module, quant)
    for name, layer in quantised(module):
        layer.set(None if quant.skips(name) else quant)
    return module.eval()


def encoder_of(quant: Quant | None, width: int = 32, layers: int = 2) -> nn.Module:
    """Its rows of different scales, so that what shares one matters."""
    torch.manual_seed(0)
    module = SeriesEncoder(
        channels=CHANNELS, classes=CLASSES, steps=STEPS, width=width, layers=layers
    )
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.mul_(torch.empty(len(layer.weight), 1).uniform_(0.5, 2))
    return rounding(module, quant) if quant else module.eval()


@functools.cache
def onnx_of(name: str | None) -> bytes:
    """The ONNX file of the encoder under a scheme, written once for all tests of a process."""
    return write_onnx.to_onnx(encoder_of(SCHEMES.get(name)), torch.zeros(2, STEPS, CHANNELS))
