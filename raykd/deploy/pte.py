"""A student as one ExecuTorch program for XNNPACK: the trained codes, never rounded again.

    int8             codes of 8 bits, a float32 scale an output
    int4             codes of 4 bits, a bfloat16 scale a group; of 8 bits where 32 does not divide a
                     layer's inputs
    everything else  float32, rounded where the student reads it rounded

XNNPACK rounds activations itself, to int8 over the range of each step of each row, zero included.
That is finer than what int8 students train with, a range for the whole call. It also happens to
those that train with float activations. Scales of 4-bit codes lose up to 1 part in 256 as bfloat16.
So answers are alike, not equal.
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
    """The program of a module with QuantLinears under `quant`, for inputs like `example` (B, T, K).

    It answers with the logits, and with the valence if the module has a value head. The module is
    changed: its layers become what the exporter reads. RecipeError if the Quant has no kernel,
    executorch is missing or the module cannot be exported.
    """
    check(quant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _take_torchao(module, quant)
        except ModuleNotFoundError:
            raise _missing() from None
    return lower(module, example)


def lower(module: nn.Module, example: Tensor) -> bytes:
    """The program of a module whose layers hold torchao's weights, or none that are rounded.

    The errors are those of `to_pte`.
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
                f"export: {type(module).__name__} cannot be written as an ExecuTorch program: "
                f"{reason(error)}; write that part of it with operations that torch.export knows"
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
    """A function that executes a program on inputs of its example's shape.

    It gives the logits, and the valence if the module has one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise _missing() from None
        program = Runtime.get().load_program(data)

    def answers(inputs: Tensor) -> list[Tensor]:
        # The program's own method: one that is kept would outlive the bytes that it reads.
        method = program.load_method("forward")
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
            f'quant.embeddings = "{quant.embeddings}": rounded tables have no ExecuTorch form '
            'here; write "none"'
        )
    if quant.per == "group" and quant.group % BLOCK:
        raise RecipeError(
            f"quant.group: XNNPACK's groups are multiples of {BLOCK}, found {quant.group}; "
            "write group = 32"
        )


def _take_torchao(module: nn.Module, quant: Quant) -> None:
    """Replace every rounded layer by one with torchao's weights.

    What is stored as int8 becomes float32.
    """
    other_parameters.bake(module)
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in quantised(module):
        if layer.quant is not None:
            assert layer.quant == quant, f"{name} is under {layer.quant}"
            assert isinstance(layer, QuantLinear), f"{name} is no linear layer"
            assert layer.blend == 1, f"{name} is still fading in"
            swaps[layer] = _of_torchao(layer, quant)
    replace(module, swaps)


def _of_torchao(layer: QuantLinear, quant: Quant) -> nn.Linear:
    """The same layer with torchao's weights."""
    from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]

    codes = layer.codes()
    scales = layer.scales()
    block = layer.in_features // scales.shape[1]
    # XNNPACK takes scales above zero.
    codes *= scales.sign().to(torch.int8).repeat_interleave(block, 1)
    is_int4 = quant.weights == "int4" and block % BLOCK == 0
    dtype = torch.int4 if is_int4 else torch.int8  # type: ignore[attr-defined]
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    weight = IntxUnpackedToInt8Tensor(
        codes, scales.abs(), zeros, dtype, (1, block), torch.float32, ROUNDING
    )
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear
