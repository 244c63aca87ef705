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
from raykd.models.adapter import TOKENS, call, call_on_tokens, field
from raykd.quant import other_parameters
from raykd.quant.swap import quantised, replace
from raykd.signals import masked_mean

ROW_LOGITS = "row_logits"


class ModelOutputs(nn.Module):
    """A module's logits, and its valence if it has a value head, in that order."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        everywhere = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        answers = call(self.module, inputs, everywhere)
        logits = field(answers, "logits")
        valence = field(answers, "valence")
        assert logits is not None
        return logits if valence is None else (logits, valence)


class RowOutputs(nn.Module):
    """A module's logits, the mean of them over each row's valid steps, and its valence if it has
    one, in that order.

    Logits of whole rows have no mean.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def answers(self, inputs: Tensor, mask: Tensor) -> Any:
        """What the module says."""
        return call(self.module, inputs, mask)

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        answers = self.answers(inputs, mask)
        logits = field(answers, "logits")
        valence = field(answers, "valence")
        assert logits is not None
        outputs = [logits]
        if logits.dim() == 3:
            outputs.append(masked_mean(logits.float(), mask))
        return (*outputs, valence) if valence is not None else tuple(outputs)

    def names(self, inputs: Tensor, mask: Tensor) -> list[str]:
        """What the outputs are called."""
        with slow_path(), torch.no_grad():
            self.module.eval()
            answers = self.answers(inputs, mask)
        logits = field(answers, "logits")
        has_steps = logits is not None and logits.dim() == 3
        found = ["logits", ROW_LOGITS] if has_steps else ["logits"]
        return found if field(answers, "valence") is None else [*found, "valence"]


class SentenceOutputs(RowOutputs):
    """The same of sentences: the inputs are their tokens (B, T), the mask is int64, too."""

    def answers(self, inputs: Tensor, mask: Tensor) -> Any:
        """What the module says."""
        return call_on_tokens(self.module, inputs, mask.bool())

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return super().forward(inputs, mask.bool())


def rows_to_onnx(module: nn.Module, example: Tensor, *, free_steps: bool) -> bytes:
    """The file of a student of series or of sentences, for rows like `example` (B, T, K), their
    layers rounded or not.

        inputs      (B, T, K) float32
        mask        (B, T) bool, True at valid steps
        input_ids, attention_mask   of sentences, in place of both: (B, T) int64
        logits      (B, T, C), or (B, C) of a model of whole rows
        row_logits  (B, C): the mean of the logits over valid steps, where they are of steps
        valence     (B, T), if the model has a value head

    It takes any number of rows, and with `free_steps` rows of 1 to T steps, else of T. The module
    is changed: its layers become what the runtime executes. RecipeError if it cannot be exported.
    """
    mask = torch.ones(example.shape[:2], dtype=torch.bool)
    free = {0: torch.export.Dim("rows", min=1, max=65536)}
    if free_steps:
        free[1] = torch.export.Dim("steps", min=1, max=example.shape[1])
    if example.is_floating_point():
        caller = RowOutputs(module)
        args = (example, mask)
        inputs = ["inputs", "mask"]
    else:
        caller = SentenceOutputs(module)
        args = (example[..., 0].long(), mask.long())
        inputs = [TOKENS, "attention_mask"]
    names = {"input_names": inputs, "output_names": caller.names(*args)}
    proto = traced(module, caller, args, **names, dynamic_shapes=(free, free))
    _check_widths(proto, module)
    return compact(proto).SerializeToString()


def to_onnx(
    module: nn.Module, example: Tensor, *, most_steps: int | None = None, any_rows: bool = True
) -> bytes:
    """The file of a module with quantised layers, for inputs like `example` (B, T, K).

    It takes any number of rows, or with `any_rows` False as many as the example has, which is
    written in half the time. With `most_steps` it takes any number of steps up to that, else as
    many as the example has. The module is changed: its layers become what the runtime executes.
    RecipeError if it cannot be exported.
    """
    free = {0: torch.export.Dim("rows", min=1, max=65536)} if any_rows else {}
    if most_steps:
        free[1] = torch.export.Dim("steps", min=1, max=most_steps)
    names = {"input_names": ["inputs"], "output_names": ["logits", "valence"]}
    proto = traced(module, ModelOutputs(module), (example,), **names, dynamic_shapes=(free,))
    _check_widths(proto, module)
    return compact(proto).SerializeToString()


def _check_widths(proto: Any, module: nn.Module) -> None:
    """RecipeError if a rounded layer's width follows the number of steps, which the tracer takes.

    An operator has one width.
    """
    nodes = [node for node in proto.graph.node if node.op_type in OPERATORS]
    values = [*proto.graph.input, *proto.graph.value_info]
    dims = {value.name: value.type.tensor_type.shape.dim for value in values}
    multiplied = [node.input[0] for node in nodes if node.op_type != GatherBlockQuantized.__name__]
    if not all(dims[name][-1].dim_value for name in multiplied):
        raise RecipeError(
            f"export: {type(module).__name__} has layers whose width follows the number of steps; "
            "leave out most_steps"
        )


def traced(module: nn.Module, caller: nn.Module, args: tuple[Any, ...], **options: Any) -> Any:
    """The graph of `caller` on `args`, with a node for each call of a rounded layer of `module`.

    The module is changed. `options` are torch.onnx.export's; names of outputs that do not exist are
    left out. RecipeError if it cannot be exported.
    """
    swaps = operators(module)
    replace(module, swaps)
    caller.eval()
    try:
        with slow_path(), torch.no_grad():
            calls = _called(caller, list(swaps.values()), args)
            proto = _exported(caller, args, options)
    except Exception as error:
        raise RecipeError(
            f"export: {type(module).__name__} cannot be written as ONNX: {reason(error)}; "
            "write that part of it with operations that torch.onnx.export knows"
        ) from error
    nodes = Counter(node.op_type for node in proto.graph.node if node.op_type in OPERATORS)
    calls = Counter({name: count for name, count in calls.items() if name in OPERATORS})
    mismatch = f"{dict(nodes)} nodes for {dict(calls)} calls of layers"
    assert nodes.keys() == calls.keys(), mismatch
    assert nodes <= calls, mismatch  # two calls of one layer with one input are merged to a node
    return proto


def compact(proto: Any) -> Any:
    """A traced graph as it is stored: short names, nothing about exporters.

    int8 parameters are written so that the runtime unfolds them when it loads the file.
    """
    _unfold(proto)
    _separate_codes(proto)
    return _bare(proto)


def operators(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """{module in training: what executes it}, of each layer and each parameter that is rounded."""
    executed: dict[nn.Module, nn.Module] = {}
    for name, layer in quantised(module):
        assert layer.quant is None or layer.blend == 1, f"{name} is still fading in"
        if layer.quant:
            executed[layer] = operator_of(layer)
    tables: dict[Tensor, Unfolded] = {}  # of a tied weight, one for all that read it
    for value, parametrisation in other_parameters.stored(module):
        if parametrisation.quant:
            tables[value] = tables.get(value) or Unfolded(value)
            executed[parametrisation] = tables[value]
    return executed


def _called(caller: nn.Module, emitted: list[nn.Module], args: tuple[Any, ...]) -> Counter[str]:
    """How often each operator is called for one answer; a layer may be shared, or unused."""
    calls: Counter[str] = Counter()
    hooks = [
        operator.register_forward_pre_hook(lambda module, _: calls.update([type(module).__name__]))
        for operator in emitted
    ]
    caller(*args)
    for hook in hooks:
        hook.remove()
    return calls


def _exported(caller: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            caller, args, dynamo=True, opset_version=OPSET, verbose=False, **options
        )
    assert program is not None
    return program.model_proto


@contextmanager
def slow_path() -> Iterator[None]:
    """Turn off the fused path of torch's encoder layers, which only reads their layers' weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def reason(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _separate_codes(proto: Any) -> None:
    """Give each MatMulInteger codes of its own.

    On x86 without VNNI onnxruntime rewrites them, and shared ones fail.
    """
    initializers = {value.name: value for value in proto.graph.initializer}
    seen: set[str] = set()
    for node in proto.graph.node:
        if node.op_type == "MatMulInteger" and (name := node.input[1]) in initializers:
            if name in seen:
                copy = proto.graph.initializer.add()
                copy.CopyFrom(initializers[name])
                copy.name = f"{name} of {node.output[0]}"
                node.input[1] = copy.name
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
    """The model with short names and without the exporter's notes, most of a small file."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    names = {"": ""}
    names |= {value.name: value.name for value in [*proto.graph.input, *proto.graph.output]}
    _strip(proto.graph, names)
    return proto


def _strip(graph: Any, names: dict[str, str]) -> None:
    """Rename every value of a graph, and of graphs in it, to a number; drop what nobody reads."""

    def short(name: str) -> str:
        return names.setdefault(name, f"{len(names):x}")

    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
        tensor.doc_string = ""
    for node in graph.node:
        node.name = ""
        node.doc_string = ""
        del node.metadata_props[:]
        kept = [attribute for attribute in node.attribute if not _is_default(node, attribute)]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for value in [*attribute.g.input, *attribute.g.output]:
                    value.name = short(value.name)
                _strip(attribute.g, names)


def _is_default(node: Any, attribute: Any) -> bool:
    """Whether an attribute has the value that a runtime takes without it."""
    if node.domain:
        return False
    default = onnx.defs.get_schema(node.op_type, OPSET).attributes[attribute.name].default_value
    if default.type != attribute.type:
        return False
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.helper.get_attribute_value(default) == value
