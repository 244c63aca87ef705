"""Laws of the models: what an Adapter hears equals calling the module by hand; the encoder against
its own definition.

The references are the modules themselves, torch's fused attention, and files that safetensors did
not write.
"""

import json
import os
import pickle
import re
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raykd.deploy import load_artefact
from raykd.errors import RecipeError
from raykd.models import build_model, hf_folder, load_weights, register_model, weights_of
from raykd.models.adapter import Adapter
from raykd.models.build import MODELS, count_parameters
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.models.size import check_size
from raykd.models.weights import check_stored, numbers_in
from raykd.recipe import imports
from raykd.recipe.tables import ModelRef
from raykd.teacher import teacher_size

B = 3
T = 7
K = 6
C = 5
D = 8
H = 2
SIZES = [(8, 1), (16, 1), (32, 1), (64, 2), (96, 3)]


@dataclass
class Answer:
    logits: Tensor
    valence: Tensor | None = None


class Net(nn.Module):
    """A small module of a user's own, whose answer has any form."""

    def __init__(self, form: str = "tensor", per_step: bool = True):
        super().__init__()
        self.form = form
        self.per_step = per_step
        self.embed = nn.Linear(K, D)
        self.mix = nn.GRU(D, D, batch_first=True)
        self.attend = nn.MultiheadAttention(D, H, batch_first=True)
        self.head = nn.Linear(D, C)

    def forward(self, inputs: Tensor):
        x = self.mix(self.embed(inputs))[0]
        x = x + self.attend(x, x, x, need_weights=False)[0]
        logits = self.head(x if self.per_step else x.mean(1))
        valence = x.mean(-1).tanh()
        forms = {
            "tensor": lambda: logits,
            "dict": lambda: {"logits": logits},
            "object": lambda: Answer(logits),
            "dict with valence": lambda: {"logits": logits, "valence": valence},
            "object with valence": lambda: Answer(logits, valence),
        }
        return forms[self.form]()


FORMS = ["tensor", "dict", "object", "dict with valence", "object with valence"]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[T], [4], [1]])
    return torch.randn(B, T, K, generator=generator), mask


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two wait for each other longer than such small products take
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_step", [True, False])
def test_any_answer_becomes_signals(batch, form, per_step):
    inputs, mask = batch
    net = Net(form, per_step).eval()
    signals = Adapter(net)(inputs, mask)
    answer = net(inputs)
    logits = answer if form == "tensor" else answer["logits"] if "dict" in form else answer.logits
    if per_step:
        assert torch.equal(signals.logits, logits)
        assert torch.equal(signals.mask, mask)
        weight = mask.float() / mask.sum(1, keepdim=True)
        torch.testing.assert_close(
            signals.sequence_logits(), torch.einsum("bt,btc->bc", weight, logits)
        )
    else:
        assert torch.equal(signals.logits, logits[:, None])
        assert signals.mask.tolist() == [[True]] * B
        assert torch.equal(signals.sequence_logits(), logits)
    assert (signals.valence is not None) == ("valence" in form)
    assert signals.layers == {}


@pytest.mark.parametrize(
    "answer", [torch.zeros(B), torch.zeros(B, T, C, 1), {"out": torch.zeros(B, C)}, None, (1, 2)]
)
def test_an_answer_without_logits_is_refused(batch, answer):
    class Mute(nn.Module):
        def forward(self, _inputs):
            return answer

    with pytest.raises(RecipeError, match=r"Mute must answer with logits \(B, C\) or \(B, T, C\)"):
        Adapter(Mute())(*batch)


def test_a_hidden_layer_is_what_the_layer_gives_by_hand(batch):
    inputs, mask = batch
    net = Net().eval()
    signals = Adapter(net, want=frozenset({"hidden.embed", "hidden.mix", "hidden.head"}))(
        inputs, mask
    )
    embedded = net.embed(inputs)
    assert torch.equal(signals.layers["hidden.embed"], embedded)
    assert torch.equal(signals.layers["hidden.mix"], net.mix(embedded)[0])
    assert torch.equal(signals.layers["hidden.head"], signals.logits)
    assert signals.layers.keys() == {"hidden.embed", "hidden.mix", "hidden.head"}


def test_an_embedding_is_the_mean_of_a_layer_over_valid_steps(batch):
    inputs, mask = batch
    net = Net().eval()
    mask = mask.clone()
    mask[0, 2:] = False
    found = Adapter(net, want=frozenset({"embedding.mix"}))(inputs, mask).layers["embedding.mix"]
    mixed = net.mix(net.embed(inputs))[0]
    assert found.shape == (B, 1, mixed.shape[-1])
    torch.testing.assert_close(found[0, 0], mixed[0, :2].mean(0))
    torch.testing.assert_close(found[1, 0], mixed[1, mask[1]].mean(0))


def test_scores_are_the_logits_of_attention_with_zeros_at_hidden_keys(batch):
    net = SeriesEncoder(channels=K, classes=C, steps=T, width=D, heads=H)
    name = "blocks.0.attention"
    layers = Adapter(net, want=frozenset({f"scores.{name}", f"attention.{name}"}))(*batch).layers
    scores = layers[f"scores.{name}"]
    rows = layers[f"attention.{name}"]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)[:, None, :]
    assert (scores.masked_select(later) == 0).all()
    torch.testing.assert_close(scores.masked_fill(later, -torch.inf).softmax(-1), rows)


def test_a_hidden_layer_inside_a_layer_is_found_and_has_gradients(batch):
    net = SeriesEncoder(channels=K, classes=C, steps=T, width=D, heads=H, layers=2)
    adapter = Adapter(net, want=frozenset({"hidden.blocks.0", "hidden.blocks.1.mlp.1"}))
    layers = adapter(*batch).layers
    expected = {"hidden.blocks.0": (B, T, D), "hidden.blocks.1.mlp.1": (B, T, 2 * D)}
    assert {k: tuple(v.shape) for k, v in layers.items()} == expected
    layers["hidden.blocks.0"].sum().backward()
    assert net.conv.weight.grad is not None
    assert net.head.weight.grad is None


def test_every_call_has_its_own_layers(batch):
    inputs, mask = batch
    adapter = Adapter(Net().eval(), want=frozenset({"hidden.embed"}))
    first = adapter(inputs, mask).layers["hidden.embed"]
    second = adapter(2 * inputs, mask).layers["hidden.embed"]
    assert torch.equal(first, adapter(inputs, mask).layers["hidden.embed"])
    assert not torch.equal(first, second)


def test_listening_changes_no_answer(batch):
    net = Net("dict with valence").eval()
    plain = Adapter(net)(*batch)
    heard = Adapter(net, want=frozenset({"hidden.mix", "attention.attend"}))(*batch)
    torch.testing.assert_close(heard.logits, plain.logits)
    assert plain.layers == {}


class Encoder(nn.Module):
    """torch's own encoder, whose layers take a fused path in evaluation that calls no submodule."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(K, D)
        layer = nn.TransformerEncoderLayer(D, H, 2 * D, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(D, C)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(inputs)))


ATTENTION = {
    "attend": lambda: Net(),
    "layers.layers.0.self_attn": Encoder,
    "blocks.1.attention": lambda: SeriesEncoder(
        channels=K, classes=C, steps=T, width=D, heads=H, layers=2
    ),
}


class Normed(nn.Module):
    """A net with buffers that its weights file holds, and a parameter with two names."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.inner = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, classes)
        self.again = self.inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.again(self.inner(inputs)).mT).mT)


def test_buffers_are_no_parameters_and_a_tied_parameter_counts_once(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "normed", Normed)
    shape = {"channels": K, "classes": C, "steps": T}
    module = Normed(K, C)
    path = tmp_path / "normed.safetensors"
    save_file(weights_of(module), path)
    ref = ModelRef(model="normed", weights=str(path))
    counted = count_parameters(ref, **shape, key="teacher")
    assert counted == (K + 1) * K + 2 * K + (K + 1) * C
    assert numbers_in([path]) > counted
    told = teacher_size.told(ref, shape)
    assert told == {"params": counted, "bytes": path.stat().st_size, "dtype": "F32, I64"}


def test_parameters_of_a_folder_are_counted_without_reading_them(tmp_path):
    module = Llama(classes=20, steps=8, width=16, layers=1, heads=2, kv_heads=1, inner=24)
    hf_folder.write(module, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    ref = ModelRef(model="llama", weights=str(tmp_path))
    counted = count_parameters(ref, channels=1, classes=20, steps=8, key="teacher")
    assert counted == sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ATTENTION)
def test_attention_rows_sum_to_one(batch, layer, training):
    module = ATTENTION[layer]().train(training)
    adapter = Adapter(module, want=frozenset({f"attention.{layer}"}))
    with torch.set_grad_enabled(training):
        maps = adapter(*batch).layers[f"attention.{layer}"]
    assert maps.shape == (B, T, H, T)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(B, T, H))
    assert not torch.allclose(maps, maps.mean(2, keepdim=True)), "heads are apart, not averaged"


def test_attention_of_torch_is_the_softmax_of_its_own_weights(batch):
    inputs, mask = batch
    net = Net().eval()
    maps = Adapter(net, want=frozenset({"attention.attend"}))(inputs, mask).layers[
        "attention.attend"
    ]
    x = net.mix(net.embed(inputs))[0]
    q, k, _ = (
        F.linear(x, net.attend.in_proj_weight, net.attend.in_proj_bias)
        .unflatten(-1, (3, H, -1))
        .unbind(2)
    )
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / (D / H) ** 0.5
    torch.testing.assert_close(maps, scores.softmax(-1))


def test_a_module_that_leaves_its_attention_is_heard(batch):
    class Own(nn.Module):
        keep_attention = False

        def forward(self, x: Tensor) -> Tensor:
            if self.keep_attention:
                self.attention = torch.full((B, H, T, T), 1 / T)
            return x

    module = nn.Sequential(Own(), nn.Linear(K, C))
    heard = Adapter(module, want=frozenset({"attention.0"}))(*batch)
    assert heard.layers["attention.0"].sum() == pytest.approx(B * H * T)


@pytest.mark.parametrize("name", ["hidden.mixx", "attention.blocks.0", "hidden.mix.9"])
def test_a_missing_layer_is_refused_with_all_layers(name):
    with pytest.raises(RecipeError) as caught:
        Adapter(Net(), want=frozenset({name}))
    text = str(caught.value)
    assert repr(name.partition(".")[2]) in text
    assert "it has embed, mix, attend, attend.out_proj, head" in text


def test_a_layer_without_attention_is_refused():
    with pytest.raises(RecipeError, match=r"'attention\.embed': a Linear shows no attention"):
        Adapter(Net(), want=frozenset({"attention.embed"}))


@pytest.fixture(params=SIZES, ids=lambda s: f"d{s[0]}L{s[1]}")
def encoder(request) -> SeriesEncoder:
    width, layers = request.param
    return SeriesEncoder(channels=K, classes=C, steps=16, width=width, layers=layers).eval()


@pytest.mark.parametrize("kept", [True, False])
def test_later_steps_change_no_earlier_answer(encoder, kept):
    """To 1e-5, because a matrix product may add in another order when its numbers change; a leak is
    of order 1.
    """
    for block in encoder.blocks:
        block.attention.keep_attention = kept
    inputs = torch.randn(4, 16, K)
    whole = encoder(inputs)
    for cut in (1, 2, 5, 8, 15):
        other = torch.cat([inputs[:, :cut], 10 * torch.randn(4, 16 - cut, K)], 1)
        for changed in (encoder(other), encoder(inputs[:, :cut])):
            for key in ("logits", "valence"):
                torch.testing.assert_close(
                    changed[key][:, :cut], whole[key][:, :cut], rtol=1e-5, atol=1e-5
                )


def test_no_gradient_flows_back_from_earlier_answers(encoder):
    inputs = torch.randn(2, 16, K, requires_grad=True)
    for step in (0, 7, 15):
        answer = encoder(inputs)
        [slope] = torch.autograd.grad(
            answer["logits"][:, step].square().sum() + answer["valence"][:, step].sum(), inputs
        )
        assert not slope[:, step + 1 :].any()
        assert slope[:, : step + 1].any(-1).all(), "and every step so far is heard"


def test_keeping_attention_changes_no_answer(encoder):
    inputs = torch.randn(4, 16, K)
    fused = encoder(inputs)
    for block in encoder.blocks:
        block.attention.keep_attention = True
    kept = encoder(inputs)
    for key in ("logits", "valence"):
        torch.testing.assert_close(kept[key], fused[key])
    for block in encoder.blocks:
        maps = block.attention.attention
        assert not maps.triu(1).any()
        torch.testing.assert_close(maps, block.attention.scores.softmax(-1))


def test_the_encoder_answers_within_its_bounds(encoder):
    answer = encoder(100 * torch.randn(4, 11, K))
    assert answer["logits"].shape == (4, 11, C)
    assert answer["valence"].shape == (4, 11)
    assert answer["valence"].abs().max() <= 1
    with pytest.raises(ValueError, match="17 steps, but this encoder was built for at most 16"):
        encoder(torch.randn(1, 17, K))


@pytest.mark.parametrize(("size", "thousands"), [((16, 1), 3.1), ((96, 3), 230)])
def test_the_sizes_told_in_the_examples_are_right(size, thousands):
    encoder = SeriesEncoder(channels=6, classes=7, steps=16, width=size[0], layers=size[1])
    assert sum(p.numel() for p in encoder.parameters()) / 1000 == pytest.approx(thousands, rel=0.02)


def made(**settings) -> nn.Module:
    return build_model(ModelRef(settings=settings), channels=K, classes=C, steps=16, key="student")


def test_weights_come_back_bit_for_bit(tmp_path):
    first = made(width=8)
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    ref = ModelRef(weights=str(tmp_path / "w.safetensors"), settings={"width": 8})
    second = build_model(ref, channels=K, classes=C, steps=16, key="teacher")
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert not torch.equal(made(width=8).head.weight, first.head.weight)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = made(width=8).state_dict()
    state["extra"] = state.pop("head.bias")
    state["value.weight"] = torch.zeros(2, 8)
    save_file(state, tmp_path / "w.safetensors")
    module = made(width=8)
    before = module.state_dict()["conv.weight"].clone()
    with pytest.raises(RecipeError) as caught:
        load_weights(module, tmp_path / "w.safetensors", "teacher")
    assert str(caught.value).splitlines() == [
        f"teacher.weights {tmp_path / 'w.safetensors'} do not fit the module:",
        "  extra: the module has none, the file (5,)",
        "  head.bias: the module has (5,), the file none",
        "  value.weight: the module has (1, 8), the file (2, 8)",
    ]
    assert torch.equal(module.state_dict()["conv.weight"], before)


def test_many_unfit_weights_are_eight_and_a_count(tmp_path):
    save_file(made(width=8).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match=r"do not fit the module:\n(  .+\n){8}  and \d+ more$"):
        load_weights(made(width=16), tmp_path / "w.safetensors", "student")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused_by_tensor(tmp_path, dtype):
    state = made(width=8).state_dict()
    state["head.weight"] = (50 * state["head.weight"]).to(dtype)
    save_file(state, tmp_path / "w.safetensors")
    told = f"  head.weight: the module has float32, the file {str(dtype).removeprefix('torch.')};"
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_weights(made(width=8), tmp_path / "w.safetensors", "teacher")
    with pytest.raises(RecipeError, match=r"w\.safetensors: head\.weight is stored as"):
        check_stored([tmp_path / "w.safetensors"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_width_are_read(tmp_path, dtype):
    state = made(width=8).state_dict()
    saved = {name: value.to(dtype) for name, value in state.items()}
    save_file(saved, tmp_path / "w.safetensors")
    module = made(width=8)
    load_weights(module, tmp_path / "w.safetensors", "teacher")
    assert torch.equal(module.state_dict()["head.weight"], saved["head.weight"].float())
    check_stored([tmp_path / "w.safetensors"])


def test_codes_of_a_module_must_be_the_files_codes(tmp_path):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor([3]))

    save_file({"seen": torch.tensor([3.5])}, tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match="seen: the module has int64, the file float32"):
        load_weights(Counting(), tmp_path / "w.safetensors", "student")


class Bomb:
    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def payloads(folder: str) -> dict[str, bytes]:
    torch.save({"w": Bomb(folder)}, f"{folder}.pt")
    with open(f"{folder}.pt", "rb") as file:
        zipped = file.read()
    save_file({"w": torch.zeros(4)}, f"{folder}.safetensors")
    with open(f"{folder}.safetensors", "rb") as file:
        sound = file.read()
    return {
        "pickle": pickle.dumps(Bomb(folder)),
        "torch.save": zipped,
        "empty": b"",
        "cut": sound[:-1],
        "longer": sound + b"\0",
        "header": b"\xff" * 8 + sound[8:],
        "words": b"not weights at all",
    }


@pytest.mark.parametrize(
    "kind", ["pickle", "torch.save", "empty", "cut", "longer", "header", "words"]
)
def test_a_corrupt_file_is_refused_and_never_run(tmp_path, kind):
    trap = tmp_path / "it_ran"
    (tmp_path / "w.safetensors").write_bytes(payloads(str(trap))[kind])
    with pytest.raises(
        RecipeError, match=r"teacher\.weights .*w\.safetensors: not a readable safetensors file"
    ):
        load_weights(made(width=8), tmp_path / "w.safetensors", "teacher")
    assert not trap.exists()


def test_the_pickle_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "it_ran"))))
    assert (tmp_path / "it_ran").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"student\.weights .*none\.safetensors: not a readable"):
        load_weights(made(), tmp_path / "none.safetensors", "student")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("raykd.models.build.MODELS", {**MODELS})


@pytest.mark.usefixtures("registry")
def test_a_registered_model_is_known_by_its_name():
    register_model("mine", lambda *, channels, classes, width: nn.Linear(channels, classes + width))
    module = build_model(
        ModelRef(model="mine", settings={"width": 2}),
        channels=K,
        classes=C,
        steps=16,
        key="student",
    )
    assert tuple(module.weight.shape) == (C + 2, K)


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(
        RecipeError,
        match=r"student\.model 'series_encodr': no such model\. Did you mean series_encoder\?",
    ):
        build_model(ModelRef(model="series_encodr"), channels=K, classes=C, steps=16, key="student")


@pytest.mark.parametrize("settings", [{"widht": 8}, {"width": "a"}, {"width": 9, "heads": 2}])
def test_settings_that_a_model_refuses_are_named_with_the_reason(settings):
    with pytest.raises(RecipeError, match=r"student\.settings: series_encoder refuses .*: .+"):
        made(**settings)


def test_a_model_is_found_in_a_module_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "mine_net.py").write_text(
        "from torch.nn import Linear\ndef net(channels, classes): return Linear(channels, classes)"
    )
    module = build_model(
        ModelRef(model="mine_net:net"), channels=K, classes=C, steps=16, key="student"
    )
    assert isinstance(module, nn.Linear)
    del sys.modules["mine_net"]
    for name, words in (("mine_net:nett", "mine_net has no"), ("mine_lost:net", "no module")):
        with pytest.raises(RecipeError, match=rf"student\.model: '{name}'.* {words}"):
            build_model(ModelRef(model=name), channels=K, classes=C, steps=16, key="student")
    sys.modules.pop("mine_net", None)


@pytest.mark.parametrize("name", ["torch.hub:load", "raykd.recipe.imports:load", "os:system"])
def test_an_artefacts_model_is_asked_about_like_a_recipes(tmp_path, name):
    described = {"model": name, "settings": {}, "classes": ["a"], "channels": 1, "steps": 2}
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(RecipeError, match=r"artefact\.model: '.*' is (code from|raykd's own)"):
        load_artefact(tmp_path)


def test_an_artefacts_model_of_a_package_is_loaded_on_purpose_only(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    net = "def net(classes, channels):\n    return nn.Linear(channels, classes)\n"
    (tmp_path / "lib" / "packed_net.py").write_text(f"from torch import nn\n{net}")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setattr(imports, "_permitted", set())
    described = {"model": "packed_net:net", "settings": {}, "classes": ["a", "b"]}
    (tmp_path / "model.json").write_text(json.dumps(described | {"channels": 3, "steps": 2}))
    trained = nn.Linear(3, 2)
    save_file(trained.state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(RecipeError, match=r'in Python allow_import=\["packed_net"\]'):
        load_artefact(tmp_path)
    student = load_artefact(tmp_path, allow_import=["packed_net"])
    rows = torch.randn(1, 2, 3)
    answered = student(rows, torch.ones(1, 2, dtype=torch.bool)).logits
    torch.testing.assert_close(answered, trained(rows))
    assert imports.environment() == {"RAYKD_ALLOW_IMPORT": "packed_net"}
    del sys.modules["packed_net"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SeriesEncoder(channels=6, classes=7, steps=100),
        lambda: Llama(classes=8, steps=9, width=8, layers=1, heads=2, kv_heads=1, inner=12),
    ],
)
def test_the_size_of_a_model_is_known_without_its_values(make):
    """To draw none on the device "meta", torch imported its compiler in each command."""
    given = []
    check_size(lambda: given.append(make()) or given[0])
    assert {value.device.type for value in given[0].state_dict().values()} == {"meta"}
    wanted = {name: (value.shape, value.dtype) for name, value in make().state_dict().items()}
    assert {n: (v.shape, v.dtype) for n, v in given[0].state_dict().items()} == wanted


def test_nothing_is_drawn_to_know_a_size():
    """Each of these would import torch._dynamo where nothing has before."""
    called = set()

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func.__name__)
            return func(*args, **(kwargs or {}))

    with Recorder():
        check_size(lambda: SeriesEncoder(channels=6, classes=7, steps=100))
    assert "empty" in called
    assert not called & {"normal_", "uniform_", "mul", "randn"}
