"""A student as one ONNX file that stock onnxruntime executes: the trained codes and scales, never
rounded again.

What a layer becomes, `raykd.deploy.onnx.operators` says; everything else is as it is.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from raykd.deploy.onnx.operators import (
    OPERATORS,
    OPSET,
    GatherBlockQuantized,
    Unfolded,
    operator_of,
)
from raykd.errors import RecipeError
from raykd.models.adapter import field
from raykd.quant import other_parameters
from raykd.quant.swap import quantised, replace


class Answers(nn.Module):
    """A module's logits, and its valence if it has a value head, in that order."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        said = self.module(inputs)
        logits, valence = field(said, "logits"), field(said, "valence")
        assert logits is not None
        return logits if valence is None else (logits, valence)


def to_onnx(module: nn.Module, example: Tensor, *, most_steps: int | None = None) -> bytes:
    """The file of a module with quantised layers, for inputs like `example` (B, T, K) of any number
    of rows.

    With `most_steps` the file takes any number of steps up to that, without it as many as the
    example has. The module is taken over: its layers become what the runtime executes. RecipeError
    where it can not be exported.
    """
    free = {0: torch.export.Dim("rows", min=1, max=65536)}
    if most_steps:
        free[1] = torch.export.Dim("steps", min=1, max=most_steps)
    names = {"input_names": ["inputs"], "output_names": ["logits", "valence"]}
    proto = traced(module, Answers(module), (example,), **names, dynamic_shapes=(free,))
    nodes = [n for n in proto.graph.node if n.op_type in OPERATORS]
    dims = {
        v.name: v.type.tensor_type.shape.dim for v in [*proto.graph.input, *proto.graph.value_info]
    }
    multiplied = [node.input[0] for node in nodes if node.op_type != GatherBlockQuantized.__name__]
    if not all(dims[name][-1].dim_value for name in multiplied):  # the tracer takes any width
        raise RecipeError(
            f"export: {type(module).__name__} has layers whose width follows the number of steps; leave out most_steps"
        )
    return compact(proto).SerializeToString()


def traced(module: nn.Module, asked: nn.Module, args: tuple[Any, ...], **options: Any) -> Any:
    """The graph of what `asked` makes of `args` by calling `module`, with a node for every call of
    a rounded layer.

    The module is taken over. `options` are torch.onnx.export's; names of outputs that there are not
    are left out. RecipeError where it can not be exported.
    """
    swaps = operators(module)
    replace(module, swaps)
    asked.eval()
    try:
        with slow_path(), torch.no_grad():
            calls = _called(asked, list(swaps.values()), args)
            proto = _exported(asked, args, options)
    except Exception as error:
        raise RecipeError(
            f"export: {type(module).__name__} can not be written as ONNX: {reason(error)}; "
            "write that part of it with operations that torch.onnx.export knows"
        ) from error
    found = Counter(node.op_type for node in proto.graph.node if node.op_type in OPERATORS)
    asked_for = Counter({name: count for name, count in calls.items() if name in OPERATORS})
    # Two calls of one layer with one input are merged to a node.
    assert found.keys() == asked_for.keys(), (
        f"{dict(found)} nodes for {dict(asked_for)} calls of layers"
    )
    assert found <= asked_for, f"{dict(found)} nodes for {dict(asked_for)} calls of layers"
    return proto


def compact(proto: Any) -> Any:
    """A traced graph as it is stored: parameters of int8 unfolded when loaded, short names, nothing
    about exporters.
    """
    _unfold(proto)
    _apart(proto)
    return _bare(proto)


def operators(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """What executes each layer and each parameter that is rounded, by the module that stands for it
    in training.
    """
    found: dict[nn.Module, nn.Module] = {}
    for name, layer in quantised(module):
        assert layer.quant is None or layer.blend == 1, f"{name} is still fading in"
        if layer.quant:
            found[layer] = operator_of(layer)
    tables: dict[Tensor, Unfolded] = {}  # of a tied weight, one for all that read it
    for value, held in other_parameters.stored(module):
        if held.quant:
            found[held] = tables[value] = tables.get(value) or Unfolded(value)
    return found


def _called(asked: nn.Module, emitted: list[nn.Module], args: tuple[Any, ...]) -> Counter[str]:
    """How often each operator is called for one answer; a layer may be shared, or unused."""
    calls: Counter[str] = Counter()
    hooks = [
        m.register_forward_pre_hook(lambda m, _: calls.update([type(m).__name__])) for m in emitted
    ]
    asked(*args)
    for hook in hooks:
        hook.remove()
    return calls


def _exported(asked: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        made = torch.onnx.export(
            asked, args, dynamo=True, opset_version=OPSET, verbose=False, **options
        )
    assert made is not None
    return made.model_proto


@contextmanager
def slow_path() -> Iterator[None]:
    """Without the fused path of torch's encoder layers, which reads their linear layers' weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def reason(error: BaseException) -> str:
    """What went wrong first, in a line."""
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _apart(proto: Any) -> None:
    """Give each MatMulInteger codes of its own: on x86 without VNNI onnxruntime rewrites them, and
    shared ones fail.
    """
    held, seen = {value.name: value for value in proto.graph.initializer}, set()
    for node in proto.graph.node:
        if node.op_type == "MatMulInteger" and (name := node.input[1]) in held:
            if name in seen:
                copy = proto.graph.initializer.add()
                copy.CopyFrom(held[name])
                copy.name = node.input[1] = f"{name} of {node.output[0]}"
            seen.add(name)


def _unfold(proto: Any) -> None:
    """Write every Unfolded parameter as Cast and Mul."""
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Unfolded":
            whole = f"{node.output[0]} as integers"
            cast = onnx.helper.make_node("Cast", node.input[:1], [whole], to=onnx.TensorProto.FLOAT)
            nodes += [cast, onnx.helper.make_node("Mul", [whole, node.input[1]], node.output)]
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    ours = [i for i, opset in enumerate(proto.opset_import) if opset.domain == "raykd"]
    for index in reversed(ours):
        del proto.opset_import[index]


def _bare(proto: Any) -> Any:
    """The model without what exporters say about themselves, and with short names: most of a small
    file.
    """
    proto.doc_string = ""
    del proto.metadata_props[:]
    names: dict[str, str] = {"": ""} | {
        v.name: v.name for v in [*proto.graph.input, *proto.graph.output]
    }
    _strip(proto.graph, names)
    return proto


def _strip(graph: Any, names: dict[str, str]) -> None:
    """Rename every value of a graph and of the graphs inside it to a short number; drop what no
    runtime reads.
    """

    def short(name: str) -> str:
        return names.setdefault(name, f"{len(names):x}")

    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name, tensor.doc_string = short(tensor.name), ""
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        kept = [a for a in node.attribute if not _is_default(node, a)]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.input[:], node.output[:] = (
            [short(n) for n in node.input],
            [short(n) for n in node.output],
        )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in [*attribute.g.input, *attribute.g.output]:
                    value.name = short(value.name)
                _strip(attribute.g, names)


def _is_default(node: Any, attribute: Any) -> bool:
    """Whether a runtime takes an attribute to be what it is without being told."""
    if node.domain:
        return False
    known = onnx.defs.get_schema(node.op_type, OPSET).attributes[attribute.name].default_value
    return known.type == attribute.type and onnx.helper.get_attribute_value(
        known
    ) == onnx.helper.get_attribute_value(attribute)
