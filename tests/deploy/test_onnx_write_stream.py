"""A series encoder that reads a window on: step by step, in any chunks and at once it answers
alike, under each scheme.

The law is of the file and of the module alike. Where activations are floats the answers are equal
up to the order of sums, 1e-5 of the largest; rounded by row or block, but for flips at ties.
Activations rounded over the whole call ("int8") have the range of each chunk: there the file
answers as the module does that reads the same chunks.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from raykd.deploy.onnx import operators, write_stream
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.deploy.onnx.stream import StreamReader
from raykd.deploy.onnx.write_decoder import names
from raykd.deploy.parity import EXACT, INTEGER, Bar, bar_of
from raykd.errors import DataError, RecipeError, StoreError
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.quant import Quant
from raykd.training import phases

ROWS = 60
STEPS = 16
CHANNELS = 3
CLASSES = 5
SCHEMES = {
    "fp32": None,
    "int8": Quant(),
    "int8-token": Quant(activations="int8_token"),
    "int4-g32-int8": Quant(weights="int4", per="group"),
    "ternary": Quant(weights="ternary", activations="none"),
    "ternary-int8": Quant(weights="ternary"),
}
CUTS = {"steps": list(range(STEPS + 1)), "chunks": [0, 1, 3, 10, STEPS], "whole": [0, STEPS]}
EACH = pytest.mark.parametrize("name", SCHEMES)


def encoder(**settings: int) -> SeriesEncoder:
    torch.manual_seed(0)
    shape = {"channels": CHANNELS, "classes": CLASSES, "steps": STEPS, "width": 32, "layers": 2}
    return SeriesEncoder(**(shape | settings)).eval()


@dataclass
class Exported:
    """A module as it trains, its file, and windows."""

    quant: Quant | None
    module: SeriesEncoder
    data: bytes
    inputs: Tensor

    def trained(self, cuts: list[int]) -> dict[str, np.ndarray]:
        """The module's answers, its past handed from call to call between the cuts."""
        step = write_stream.StreamStep(self.module)
        state = write_stream.empty(self.module, ROWS)
        found = []
        with torch.inference_mode():
            for a, b in pairwise(cuts):
                logits, valence, tail, *kept = step(self.inputs[:, a:b], *state)
                state = (tail, kept[: len(kept) // 2], kept[len(kept) // 2 :])
                found.append((logits.numpy(), valence.numpy()))
        return joined([{"logits": logits, "valence": valence} for logits, valence in found])

    def answered(self, cuts: list[int], rows: slice = slice(None)) -> dict[str, np.ndarray]:
        inputs = self.inputs[rows].numpy()
        stream = StreamReader(self.data, rows=len(inputs))
        return joined([stream.step(inputs[:, a:b]) for a, b in pairwise(cuts)])

    def plain(self) -> dict[str, np.ndarray]:
        """The module's answers to whole windows, as it was trained."""
        with torch.inference_mode():
            return {name: value.numpy() for name, value in self.module(self.inputs).items()}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}


@pytest.fixture(scope="module")
def exported():
    """The encoder under a scheme, exported once for all that is asked of it."""
    made = {}

    def get(name: str) -> Exported:
        if name not in made:
            module = encoder()
            quant = SCHEMES[name]
            if quant:
                phases.round_as(module, quant)
            made[name] = Exported(
                quant,
                module,
                write_stream.to_onnx(copy.deepcopy(module)),
                torch.randn(ROWS, STEPS, CHANNELS),
            )
        return made[name]

    return get


def assert_alike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bar: Bar) -> None:
    each = np.abs(found["logits"] - wanted["logits"]).max(-1) / np.abs(wanted["logits"]).max()
    assert np.quantile(each, 0.99) <= bar.relative
    assert each.max() <= bar.largest
    value = np.abs(found["valence"] - wanted["valence"]) / np.abs(wanted["valence"]).max()
    assert np.quantile(value, 0.99) <= bar.relative
    assert value.max() <= 5 * bar.largest, "tanh of one neuron, at its steepest where it is small"


@EACH
def test_with_the_same_past_the_file_answers_as_the_module_does(name, exported):
    case = exported(name)
    for cuts in CUTS.values():
        assert_alike(case.answered(cuts), case.trained(cuts), bar_of(case.quant))


@EACH
@pytest.mark.parametrize("cuts", CUTS)
def test_any_chunks_answer_as_the_whole_window_unless_activations_are_rounded_over_the_call(
    name, cuts, exported
):
    case = exported(name)
    found = case.answered(CUTS[cuts])
    whole = case.plain()
    if name == "int8" and cuts != "whole":
        each = np.abs(found["logits"] - whole["logits"]).max(-1) / np.abs(whole["logits"]).max()
        assert np.quantile(each, 0.5) > 1e-3, "the range is that of the chunk"
        return
    assert_alike(found, whole, bar_of(case.quant))


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "int8"])
def test_rows_do_not_depend_on_each_other(name, exported):
    case = exported(name)
    alone = [case.answered(CUTS["chunks"], slice(i, i + 1)) for i in range(8)]
    each = {key: np.concatenate([part[key] for part in alone]) for key in ("logits", "valence")}
    whole = {key: value[:8] for key, value in case.answered(CUTS["chunks"]).items()}
    assert_alike(each, whole, bar_of(case.quant))


@EACH
def test_a_step_is_blind_to_what_comes_after_it_and_sees_all_before(name, exported):
    """Changed later inputs change nothing; a changed first one changes the last answer, through
    keys and values.
    """
    case = exported(name)
    stream = StreamReader(case.data, rows=ROWS)
    inputs = case.inputs.numpy()
    first = stream.step(inputs[:, :6])
    later = stream.step(inputs[:, 6:])
    stream.reset()
    np.testing.assert_array_equal(stream.step(inputs[:, :6])["logits"], first["logits"])
    stream.reset()
    stream.step(np.concatenate([3 * inputs[:, :1], inputs[:, 1:6]], 1))
    assert np.abs(stream.step(inputs[:, 6:])["logits"] - later["logits"])[:, -1].max() > 1e-4


@EACH
def test_its_operators_and_its_bytes_are_those_of_the_file_of_a_window(name, exported):
    case = exported(name)
    proto = onnx.load_from_string(case.data)
    whole = onnx.load_from_string(write_onnx.to_onnx(copy.deepcopy(case.module), case.inputs[:2]))
    ours, theirs = (Counter(n.op_type for n in p.graph.node) for p in (proto, whole))
    for kind in (
        *operators.OPERATORS,
        "DynamicQuantizeLinear",
        "MatMul",
        "Conv",
        "Attention",
        "LayerNormalization",
    ):
        assert ours[kind] == theirs[kind], kind
    assert sum(ours[kind] for kind in operators.OPERATORS) == (8 if case.quant else 0)
    assert ours["MatMul"] == (2 if case.quant else 10), "two heads, and four layers of each block"
    assert ours["Attention"] == 2
    held = [
        Counter((tuple(t.dims), t.raw_data) for t in p.graph.initializer if len(t.raw_data) > 64)
        for p in (proto, whole)
    ]
    assert held[0] == held[1], "codes, scales and floats, each once and none besides"
    assert {p.key: p.value for p in proto.metadata_props} == {"steps": str(STEPS)}
    assert not proto.graph.value_info
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)


@pytest.mark.parametrize("settings", [{"kernel": 1}, {"kernel": 20, "layers": 1, "heads": 4}])
def test_a_kernel_of_one_step_and_one_longer_than_the_window_are_read_on_too(settings):
    module = encoder(**settings)
    case = Exported(None, module, b"", torch.randn(ROWS, STEPS, CHANNELS))
    wanted = case.plain()
    case.data = write_stream.to_onnx(copy.deepcopy(module))
    assert StreamReader(case.data).state["tail"].shape == (1, CHANNELS, settings["kernel"] - 1)
    for cuts in CUTS.values():
        assert_alike(case.answered(cuts), wanted, EXACT)


def test_attention_maps_are_kept_of_what_was_read_before_too():
    module = encoder()
    x = torch.randn(2, STEPS, CHANNELS)
    for block in module.blocks:
        block.attention.keep_attention = True
    module(x)
    whole = [block.attention.attention for block in module.blocks]
    step = write_stream.StreamStep(module)
    state = write_stream.empty(module, 2)
    _, _, tail, *kept = step(x[:, :10], *state)
    step(x[:, 10:], tail, kept[:2], kept[2:])
    for block, maps in zip(module.blocks, whole, strict=True):
        torch.testing.assert_close(block.attention.attention, maps[:, :, 10:], atol=1e-6, rtol=0)


def test_a_state_can_be_put_down_and_taken_up_elsewhere(exported):
    case = exported("int8-token")
    inputs = case.inputs.numpy()
    stream = StreamReader(case.data, rows=ROWS)
    stream.step(inputs[:, :7])
    state = stream.state
    wanted = stream.step(inputs[:, 7:])
    other = StreamReader(case.data, rows=3)
    other.reset({name: value[5:8] for name, value in state.items()})
    assert other.length == 7
    assert_alike(
        other.step(inputs[5:8, 7:]), {name: value[5:8] for name, value in wanted.items()}, INTEGER
    )


def test_what_can_not_be_read_is_refused_and_changes_nothing(exported):
    case = exported("ternary")
    inputs = case.inputs.numpy()
    stream = StreamReader(case.data, rows=2)
    first = stream.step(inputs[:2, :10])
    for wrong in (inputs[:2, :7], inputs[:1, :5], inputs[:2, :0], inputs[:2, :5, :2]):
        with pytest.raises(
            DataError,
            match="after 10 steps; this stream takes 2 rows of 3 channels, and 16 steps in all",
        ):
            stream.step(wrong)
    others = StreamReader(case.data, rows=3)
    others.step(inputs[:3, :10])
    with pytest.raises(
        DataError, match=r"state: tail is float32 \(3, 3, 4\), this stream of 2 rows takes float32"
    ):
        stream.reset(others.state)
    longer = {
        n: v if n == "tail" else np.zeros((2, *v.shape[1:2], 17, v.shape[3]), np.float32)
        for n, v in stream.state.items()
    }
    with pytest.raises(DataError, match="of 17 steps, but a window ends after 16"):
        stream.reset(longer)
    with pytest.raises(
        DataError,
        match=r"state: holds tail, this stream keeps tail, keys.0, keys.1, values.0, values.1",
    ):
        stream.reset({"tail": stream.state["tail"]})
    assert stream.length == 10
    rest = stream.step(inputs[:2, 10:])
    wanted = {name: value[:2] for name, value in case.plain().items()}
    assert_alike(joined([first, rest]), wanted, EXACT)
    with pytest.raises(DataError, match="after 16 steps"):
        stream.step(inputs[:2, :1])


def test_the_file_and_the_module_end_where_their_positions_end(exported):
    tail, keys, values = write_stream.empty(encoder(), 2, past=10)
    feed = dict(
        zip(
            ["past_tail", *(f"past_{name}" for name in names(2))],
            [tail, *keys, *values],
            strict=True,
        )
    )
    feed = {name: value.numpy() for name, value in feed.items()}
    session = onnx_session.session(exported("ternary").data)
    assert (
        session.run(["logits"], feed | {"inputs": np.zeros((2, 6, CHANNELS), np.float32)})[0].shape[
            1
        ]
        == 6
    )
    with pytest.raises(Exception, match=r"invalid ind|out of"):
        session.run(["logits"], feed | {"inputs": np.zeros((2, 7, CHANNELS), np.float32)})
    module = encoder()
    step = write_stream.StreamStep(module)
    state = write_stream.empty(module, 2, past=10)
    with pytest.raises(
        ValueError, match="7 steps after 10, but this encoder was built for at most 16"
    ):
        step(torch.zeros(2, 7, CHANNELS), *state)


def test_what_does_not_read_on_is_refused(exported):
    with pytest.raises(StoreError, match="not a streaming ONNX file"):
        StreamReader(write_onnx.to_onnx(encoder(), torch.zeros(2, STEPS, CHANNELS)))
    for module, found in (
        (nn.Linear(3, 3), "found a Linear"),
        (encoder(layers=0), "without a layer"),
        (encoder(steps=3), "a window of 3 steps"),
    ):
        with pytest.raises(RecipeError, match=rf"export.stream: .*{found}.*write stream = false"):
            write_stream.check(module)
