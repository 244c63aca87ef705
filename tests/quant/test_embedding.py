"""Rounded embeddings: rows by their definition, gradients of a table, and onnxruntime's own look-up
bit for bit.
"""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import RecipeError
from raykd.quant.embedding import QuantEmbedding
from raykd.quant.pack import unpack
from raykd.quant.rounding import LEAST
from raykd.quant.swap import Left, QuantLayer, left, prepare, quantised
from raykd.recipe.quant import BITS, LEVELS, SCALES, Quant
from raykd.training import phases

ROWS = 30
KINDS = ("int8", "int4", "ternary")
QUANTS = {f"{kind}-row": Quant(weights="int8", embeddings=kind) for kind in KINDS}
QUANTS |= {
    f"{kind}-g16": Quant(weights="int4", per="group", group=16, embeddings=kind) for kind in KINDS
}
EACH = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)


def table_of(quant: Quant | None, width: int = 64, **settings: object) -> QuantEmbedding:
    """Its rows of very different sizes, the first all zeros."""
    torch.manual_seed(0)
    plain = nn.Embedding(ROWS, width, **settings)
    with torch.no_grad():
        plain.weight.mul_(torch.logspace(-2, 2, ROWS)[:, None])
        plain.weight[0] = 0
    table = QuantEmbedding.of(plain)
    table.set(quant)
    return table


@EACH
@pytest.mark.parametrize("width", [64, 48, 40, 33])
def test_a_table_is_codes_times_the_scales_of_its_rows(quant, width):
    """From the table of definitions; a width that no group divides has a scale a row."""
    table = table_of(quant, width)
    largest = LEVELS[quant.embeddings]
    whole = quant.per != "group" or width % quant.group
    groups = table.weight.detach().reshape(ROWS, 1 if whole else width // quant.group, -1)
    size = (
        groups.abs().amax(-1) / largest
        if SCALES[quant.embeddings] == "absmax"
        else groups.abs().mean(-1)
    )
    scales = size.clamp(min=LEAST)
    assert torch.equal(table.scales(), scales)
    codes = (groups / scales[..., None]).round().clamp(-largest, largest)
    assert torch.equal(table.codes(), codes.reshape(ROWS, width).to(torch.int8))
    assert torch.equal(table.rounded(), (codes * scales[..., None]).reshape(ROWS, width))
    assert len(table.codes().unique()) <= 2 * largest + 1
    assert len(table.codes().unique()) > largest, "and the levels are used"


@EACH
def test_what_is_looked_up_is_the_rounded_table_and_a_row_alone_is_rounded_alike(quant):
    table = table_of(quant)
    ids = torch.randint(ROWS, (4, 7))
    assert torch.equal(table(ids), table.rounded()[ids])
    assert torch.equal(table(ids[2, 3]), table.rounded()[ids[2, 3]])
    assert table(ids[:0]).shape == (0, 7, 64)


@EACH
def test_rows_scaled_by_powers_of_two_round_alike(quant):
    table = table_of(quant)
    power = 2.0 ** torch.arange(-15, 15)[:, None]
    before = table.rounded().detach()[1:]
    codes = table.codes()
    with torch.no_grad():
        table.weight.mul_(power)
    assert torch.equal(table.rounded()[1:], before * power[1:])
    assert torch.equal(table.codes(), codes)


@EACH
def test_gradients_go_straight_through_to_the_rows_that_were_looked_up(quant):
    table = table_of(quant, padding_idx=3)
    plain = table_of(None, padding_idx=3)
    ids = torch.tensor([[1, 3, 5], [5, 5, 9]])
    upstream = torch.randn(2, 3, 64)
    for each in (table, plain):
        each(ids).backward(upstream)
    assert torch.equal(table.weight.grad, plain.weight.grad)
    assert table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 5, 9], (
        "nor to what pads"
    )


@EACH
def test_rounding_fades_in_from_the_plain_table(quant):
    table = table_of(quant)
    ids = torch.arange(ROWS)
    table.blend = 0.0
    assert torch.equal(table(ids), table.weight)
    table.blend = 0.25
    torch.testing.assert_close(table(ids), 0.75 * table.weight + 0.25 * table_of(quant).rounded())


@EACH
def test_a_table_in_bfloat16_is_rounded_in_float32(quant):
    half = QuantEmbedding.of(table_of(None).bfloat16())
    half.set(quant)
    found = half(torch.arange(ROWS))
    assert found.dtype == torch.bfloat16
    whole = QuantEmbedding.of(nn.Embedding(ROWS, 64, _weight=half.weight.detach().float()))
    whole.set(quant)
    assert torch.equal(found, whole(torch.arange(ROWS)).bfloat16())
    found.sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


def test_a_table_that_is_not_finite_is_refused():
    table = table_of(QUANTS["int4-row"])
    with torch.no_grad():
        table.weight[4, 4] = torch.nan
    for call in (table.codes, lambda: table.set(QUANTS["int8-row"])):
        with pytest.raises(RecipeError, match="weights are NaN or infinite"):
            call()


class Speaker(nn.Module):
    """Tokens and places, a layer, and a head that is tied to the tokens."""

    def __init__(self, width: int = 40, tied: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(ROWS, width)
        self.places = nn.Embedding(16, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, ROWS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.mix(x) + self.tokens(ids)))


class Looked(nn.Module):
    """A table and nothing else."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def rounding(module: nn.Module, quant: Quant) -> nn.Module:
    phases.round_as(module, quant)
    return module.eval()


def answered(module: nn.Module, ids: Tensor, folder) -> np.ndarray:
    (folder / "student.onnx").write_bytes(write_onnx.to_onnx(module, ids[:2], most_steps=16))
    return onnx_session.session(folder / "student.onnx").run(["logits"], {"inputs": ids.numpy()})[0]


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("int8-row", 40),
        ("int4-row", 33),
        ("ternary-row", 33),
        ("int8-g16", 64),
        ("int4-g16", 48),
        ("ternary-g16", 64),
    ],
)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_onnxruntime_looks_up_the_trained_table_bit_for_bit(name, width, kind, tmp_path):
    """The file holds the very codes and scales; of a last byte the rest is zeros."""
    quant = QUANTS[name]
    table = table_of(QUANTS[name], width)
    codes = table.codes().numpy()
    scales = table.scales().numpy()
    ids = torch.cat([torch.arange(ROWS), torch.randint(ROWS, (18,))]).reshape(4, 12).to(kind)
    expected = table(ids).detach().numpy()
    assert np.array_equal(answered(Looked(table), ids, tmp_path), expected)

    graph = onnx.load(tmp_path / "student.onnx").graph
    (node,) = [n for n in graph.node if n.op_type == "GatherBlockQuantized"]
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    bits = BITS[quant.embeddings]
    assert {a.name: a.i for a in node.attribute}["bits"] == bits
    found = unpack(held[node.input[0]], bits)
    assert found.shape[1] - width < 8 // bits
    assert np.array_equal(found[:, :width], codes)
    assert not found[:, width:].any()
    assert np.array_equal(held[node.input[2]], scales)
    assert not any(
        array.size == ROWS * width and array.dtype == np.float32 for array in held.values()
    )


TIED = {
    "head left": Quant(weights="int4", embeddings="int8", activations="none", rest="fp32"),
    "head stored": Quant(weights="int4", embeddings="int8", activations="none"),
    "head rounded": Quant(weights="int4", embeddings="int8", activations="none", skip=[]),
    "both stored": Quant(weights="int4", activations="none"),
}


@pytest.mark.parametrize("quant", TIED.values(), ids=TIED)
def test_a_tied_table_stays_one_parameter_and_each_use_rounds_it_once(quant, tmp_path):
    """Answers are those of two parameters of the same values, the gradient is the sum of theirs."""
    torch.manual_seed(0)
    module = Speaker()
    apart = Speaker(tied=False)
    apart.load_state_dict(module.state_dict())
    (module, (own,)), (apart, (table, head)) = (
        (m, tables(m)) for m in (rounding(module, quant), rounding(apart, quant))
    )
    ids = torch.randint(ROWS, (6, 9))
    for _ in range(2):
        answers = module(ids)
        expected = apart(ids)
        assert torch.equal(answers, expected)
        upstream = torch.randn_like(answers)
        answers.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(own.grad, table.grad + head.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            own -= 0.01 * own.grad
            table.copy_(own)
            head.copy_(own)
        module.zero_grad()
        apart.zero_grad()
    expected = module(ids).detach().numpy()
    found = answered(module, ids, tmp_path)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def tables(module: nn.Module) -> list[Tensor]:
    """The parameters of a table's or a head's shape, each once."""
    return [p for p in module.parameters() if p.shape == (ROWS, 40)]


def test_a_rounded_speaker_learns_and_is_executed_as_it_learnt(tmp_path):
    """To say its own token: a ternary table, ternary layers, 200 steps; from ln 30 = 3.4 nats."""
    torch.manual_seed(0)
    module = rounding(
        Speaker(tied=False), Quant(weights="ternary", embeddings="ternary", activations="none")
    ).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        ids = torch.randint(ROWS, (32, 1)).repeat(1, 4)
        loss = nn.functional.cross_entropy(module(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 > 0.2 > losses[-1]
    ids = torch.randint(ROWS, (20, 8))
    expected = module.eval()(ids).detach().numpy()
    found = answered(module, ids, tmp_path)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_what_is_asked_is_swapped_and_the_rest_is_named_with_a_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = nn.Embedding(8, 16, max_norm=1.0)
            self.tokens = nn.Embedding(8, 16)
            self.attention = nn.MultiheadAttention(16, 2)
            self.places = nn.Parameter(torch.zeros(4, 16))
            self.norm = nn.LayerNorm(16)
            self.conv = nn.Conv1d(16, 16, 1)
            self.inner = nn.Linear(16, 16)
            self.again = self.inner
            self.head = nn.Linear(16, 8)

    both = Quant(embeddings="int8")
    expected = [
        Left("places", "a Model has no rounded form"),
        Left("normed", "max_norm rewrites its rows as they are read"),
        Left("attention.in_proj_weight", "a MultiheadAttention has no rounded form"),
        Left(
            "attention.out_proj",
            "a NonDynamicallyQuantizableLinear may be read by its owner and never called",
        ),
        Left("conv.weight", "a Conv1d has no rounded form"),
        Left("head", "skip names it"),
    ]
    module = Model()
    assert left(module, both) == expected
    assert prepare(module, both) == ["tokens", "inner"]
    assert left(module, both) == expected, "and so after the swap"
    assert isinstance(module.tokens, QuantEmbedding)
    assert module.again is module.inner
    assert Left("tokens", 'embeddings = "none"') in left(module, Quant())
    assert prepare(Model(), Quant()) == ["inner"]
    assert prepare(Model(), Quant(embeddings="int4", skip=["inner", "head"])) == ["tokens"]
    assert Left("tokens", "skip names it") in left(module, Quant(embeddings="int8", skip=["tok*"]))
    with pytest.raises(RecipeError, match='embeddings = "none" leave out every one'):
        prepare(Model(), Quant(skip=["inner", "head"]))


def test_what_is_prepared_and_what_is_left_are_all_layers():
    for quant in (Quant(), Quant(embeddings="int4"), Quant(skip=["mix"], embeddings="int8")):
        module = Speaker()
        names = prepare(module, quant)
        assert sorted(names + [name for name, _ in left(module, quant)]) == [
            "head",
            "mix",
            "places",
            "tokens",
        ]


def test_a_phase_without_embeddings_leaves_a_prepared_table_as_it_is():
    module = rounding(Speaker(), QUANTS["ternary-row"])
    ids = torch.arange(ROWS)
    assert not torch.equal(module.tokens(ids), module.tokens.weight)
    layers: list[QuantLayer] = [layer for _, layer in quantised(module)]
    for layer in layers:
        layer.set(Quant())
    assert module.tokens.quant is None
    assert torch.equal(module.tokens(ids), module.tokens.weight)
