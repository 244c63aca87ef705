"""A small Llama under every scheme that has a type of GGUF."""

import torch
from language import TOKENS

from raykd.models.llama import Llama
from raykd.recipe.quant import Quant

STEPS = 128
TERNARY = Quant(weights="ternary", activations="none")
SCHEMES = {  # the Quant, the model's shape, the type of its layers, of its table
    "fp32": (None, {}, "F32", "F32"),
    "fp32-free": (None, {"tied": False, "kv_heads": 1}, "F32", "F32"),
    "fp32-sub-norm": (None, {"sub_norm": True}, "F32", "F32"),
    "ternary": (TERNARY, {}, "TQ2_0", "Q8_0"),
    "ternary-tq1": (TERNARY, {}, "TQ1_0", "Q8_0"),
    "ternary-int8-tensor": (
        Quant(weights="ternary", per="tensor", rest="fp32"),
        {"tied": False},
        "TQ2_0",
        "F32",
    ),
    "ternary-sub-norm": (TERNARY, {"sub_norm": True}, "TQ2_0", "Q8_0"),
    "int4-g32": (Quant(weights="int4", per="group", activations="none"), {}, "Q4_0", "Q8_0"),
    "int8-table": (Quant(activations="int8_token", embeddings="int8"), {}, "Q8_0", "Q8_0"),
}


def llama(**shape) -> Llama:
    torch.manual_seed(0)
    return Llama(classes=TOKENS, steps=STEPS, width=256, heads=4, inner=512, **shape)
