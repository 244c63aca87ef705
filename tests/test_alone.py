"""The artefact's own run.py in a new virtual environment that holds numpy and onnxruntime, and nothing of ours."""

import copy
import json
import re
import subprocess
import venv
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pytest
import torch
from language import HELD_OUT, READ, TOKENS, bpe, text, train
from test_onnx import CHANNELS, SCHEMES, STEPS, encoder_of

from raykd import onnx_file, phases
from raykd.decoder import Decoder
from raykd.decoder_artefact import export_decoder
from raykd.models.llama import Llama
from raykd.quant.scheme import Quant

WIDTHS = ("int8-tensor", "int8-channel", "int4-g32", "ternary-channel", "ternary-g32-int8")
DECODERS = {  # int8_token: MatMulInteger of unsigned activations saturates on processors without VNNI
    "int8-tensor": Quant(per="tensor", activations="int8_token"),
    "int8-channel": Quant(activations="int8_token"),
    "int4-g32": Quant(weights="int4", per="group", activations="none"),
    "ternary": Quant(weights="ternary", activations="none"),
}
NAMES = ["still", "walk", "run", "jump", "fall"]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Its interpreter, with the versions that the tests run against."""
    where = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(where, with_pip=True)
    wanted = [f"{name}=={metadata.version(name)}" for name in ("numpy", "onnxruntime")]
    install = [where / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, timeout=240)
    if done.returncode and re.search(r"No matching distribution|Connection|resolve", done.stderr):
        pytest.skip("no package index to install numpy and onnxruntime from")
    assert done.returncode == 0, done.stderr
    return where / "bin" / "python"


@pytest.mark.parametrize(
    "name", [None, "int8-tensor", "int8-channel", "int4-g32", "ternary-channel", "ternary-g32-int8"]
)
def test_its_decisions_are_those_of_the_student_that_was_trained(name, python, tmp_path):
    module = encoder_of(SCHEMES.get(name)).eval()
    windows = torch.randn(64, STEPS, CHANNELS, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():  # one by one, as run.py asks: int8 rounds over the whole of a call
        said = torch.cat([module(window[None])["logits"].mean(1) for window in windows]).softmax(-1)
    (tmp_path / "student.onnx").write_bytes(onnx_file.to_onnx(module, windows[:2]))
    (tmp_path / "model.json").write_text(json.dumps({"classes": NAMES}))
    (tmp_path / "run.py").write_text((resources.files("raykd") / "card/run_onnx.py").read_text())
    np.save(tmp_path / "windows.npy", windows.numpy())
    done = subprocess.run(
        [python, "-I", tmp_path / "run.py", tmp_path / "windows.npy"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    sure = said.topk(2).values.diff().abs().squeeze() > 0.01  # an untrained net's near ties may flip
    assert len(lines) == len(windows)
    assert sure.float().mean() > 0.5
    assert [n for (n, _), s in zip(lines, sure, strict=True) if s] == [NAMES[i] for i in said.argmax(1)[sure]]
    np.testing.assert_allclose([float(p) for _, p in lines], said.amax(1), atol=0.02)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tokeniser, its file, and a model of the text that learnt in full precision."""
    path = tmp_path_factory.mktemp("language") / "tokenizer.json"
    tokenizer = bpe(path)
    torch.manual_seed(0)
    module = Llama(classes=TOKENS, steps=128)
    return tokenizer, path, train(module, text(tokenizer, *READ), 200, 3e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_language_models_greedy_text_is_that_of_its_decoder(name, python, language, tmp_path):
    """With its tokeniser from text to text, without from ids to ids."""
    tokenizer, path, learnt = language
    module, folder = copy.deepcopy(learnt), tmp_path / "artefact"
    phases.round_as(module, DECODERS[name])
    train(module, text(tokenizer, *READ), 30, 1e-3)
    held_out = text(tokenizer, HELD_OUT)[: 12 * 128].reshape(12, 128)
    export_decoder(module, folder, tokens=held_out, tokenizer=path)
    prompt = "def shorten(text, width=70):\n    # caf\u00e9, \u4e09 m\u00b2 - it's\n"
    ids = tokenizer.encode(prompt).ids
    said = Decoder(folder / "student.onnx").generate(np.array([ids]), 40)[0].tolist()
    assert len(set(said)) > 2, "not one word again and again"

    def answered(prompt: str) -> bytes:
        script = [python, "-I", folder / "run.py", prompt, "40"]
        done = subprocess.run(script, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert answered(prompt).decode("utf-8", "replace") == tokenizer.decode(said) + "\n"
    (folder / "tokenizer.json").unlink()
    assert answered(" ".join(map(str, ids))).split() == [str(i).encode() for i in said]


def test_the_environment_holds_nothing_of_ours(python):
    asked = [python, "-I", "-c", "import raykd"]
    assert "No module named 'raykd'" in subprocess.run(asked, capture_output=True, text=True, timeout=60).stderr
    asked[-1] = "import torch"
    assert "No module named 'torch'" in subprocess.run(asked, capture_output=True, text=True, timeout=60).stderr
