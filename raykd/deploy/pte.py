"""A student as one ExecuTorch program for XNNPACK: the trained codes, never rounded again.

    int8             codes of 8 bits, a float32 scale an output int4             codes of 4 bits, a
    bfloat16 scale a group; of 8 bits where 32 does not divide a layer's inputs everything else
    float32, rounded where the student reads it rounded

XNNPACK rounds activations itself, to int8 over the range of each step of each row, zero included.
That is finer than what int8 students train with, a range for the whole call, and it happens to
those that train with float activations, too. Scales of 4-bit codes lose up to 1 part in 256 as
bfloat16. So answers are alike, not equal.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raykd.deploy.onnx.write import ModelOutputs, reason, slow_path
from raykd.errors import RecipeError
from raykd.quant import other_parameters
from raykd.quant.swap import QuantLinear, quantised, replace
from raykd.recipe.quant import Quant

BLOCK = 32  # XNNPACK's groups of 4-bit codes are multiples of this
ROUNDING = "int8_asym_per_token"  # torchao's name for how XNNPACK rounds activations


def to_pte(module: nn.Module, example: Tensor, quant: Quant) -> bytes:
    """The program of a module with QuantLinears under `quant`, for inputs of the shape of `example`
    (B, T, K).

    It answers with the logits, and with the valence if the module has a value head. The module is
    taken over: its layers become what the exporter reads. RecipeError where the Quant has no
    kernel, executorch is missing or the module can not be exported.
    """
    check(quant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _hold(module, quant)
        except ModuleNotFoundError:
            raise _missing() from None
    return lower(module, example)


def lower(module: nn.Module, example: Tensor) -> bytes:
    """The program of a module whose layers hold torchao's weights, or none that are rounded.

    Errors as of `to_pte`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise _missing() from None
        try:
            with slow_path(), torch.no_grad():
                exported = torch.export.export(
                    ModelOutputs(module).eval(), (example,), strict=False
                )
                edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
                program = edge.to_executorch()
        except Exception as error:
            raise RecipeError(
                f"export: {type(module).__name__} can not be written as an ExecuTorch program: {reason(error)}; "
                "write that part of it with operations that torch.export knows"
            ) from error
    calls = {
        str(node.target)
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function"
    }
    left = [name for name in calls if "quantize" in name or "choose_qparams" in name]
    assert not left, f"XNNPACK left {left} to slower kernels"
    return program.buffer


def load(data: bytes) -> Callable[[Tensor], list[Tensor]]:
    """What a program answers to inputs of its example's shape: logits, and valence if it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise _missing() from None
        program = Runtime.get().load_program(data)

    def answers(inputs: Tensor) -> list[Tensor]:
        method = program.load_method(
            "forward"
        )  # the program's own; alone it would outlive the bytes that it reads
        assert method is not None
        return list(method.execute([inputs]))

    return answers


def _missing() -> RecipeError:
    return RecipeError(
        "export: an ExecuTorch program needs executorch; type: pip install 'raykd[executorch]'"
    )


def check(quant: Quant) -> None:
    """RecipeError if XNNPACK has no kernel for a Quant."""
    if quant.weights == "ternary":
        raise RecipeError(
            "quant.weights: ExecuTorch has no ternary kernels; export the student as ONNX, "
            'or train it with weights = "int8" or "int4"'
        )
    if quant.embeddings != "none":
        raise RecipeError(
            f'quant.embeddings = "{quant.embeddings}": rounded tables have no ExecuTorch form here; write "none"'
        )
    if quant.per == "group" and quant.group % BLOCK:
        raise RecipeError(
            f"quant.group: XNNPACK's groups are multiples of {BLOCK}, found {quant.group}; write group = 32"
        )


def _hold(module: nn.Module, quant: Quant) -> None:
    """Replace every layer that is rounded by one with torchao's weights; what is stored as int8 is
    float32 here.
    """
    other_parameters.bake(module)
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in quantised(module):
        if layer.quant is not None:
            assert layer.quant == quant, f"{name} is under {layer.quant}"
            assert isinstance(layer, QuantLinear), f"{name} is no linear layer"
            assert layer.blend == 1, f"{name} is still fading in"
            swaps[layer] = _held(layer, quant)
    replace(module, swaps)


def _held(layer: QuantLinear, quant: Quant) -> nn.Linear:
    from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]

    codes, scales = layer.codes(), layer.scales()
    block = layer.in_features // scales.shape[1]
    codes *= (
        scales.sign().to(torch.int8).repeat_interleave(block, 1)
    )  # XNNPACK takes scales above zero
    held = torch.int4 if quant.weights == "int4" and block % BLOCK == 0 else torch.int8  # type: ignore[attr-defined]
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    weight = IntxUnpackedToInt8Tensor(
        codes, scales.abs(), zeros, held, (1, block), torch.float32, ROUNDING
    )
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made
