"""The artefact's own run.py in a new virtual environment that holds numpy and onnxruntime, and
nothing of ours.
"""

import json
import subprocess
from importlib import resources

import numpy as np
import pytest
import torch
from encoders import CHANNELS, SCHEMES, STEPS, encoder_of

from raykd.deploy.onnx import write as write_onnx

ROWS = {"channels": CHANNELS, "shortest": 1, "longest": STEPS, "padding": "none"}
NAMES = ["still", "walk", "run", "jump", "fall"]


@pytest.mark.parametrize(
    "name", [None, "int8-tensor", "int8-channel", "int4-g32", "ternary-channel", "ternary-g32-int8"]
)
def test_its_decisions_are_those_of_the_student_that_was_trained(name, python, tmp_path):
    module = encoder_of(SCHEMES.get(name)).eval()
    windows = torch.randn(64, STEPS, CHANNELS, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():  # one by one, as run.py asks: int8 rounds over the whole of a call
        said = torch.cat([module(window[None])["logits"].mean(1) for window in windows]).softmax(-1)
    (tmp_path / "student.onnx").write_bytes(
        write_onnx.rows_to_onnx(module, windows[:2], free_steps=True)
    )
    (tmp_path / "model.json").write_text(json.dumps({"classes": NAMES, "rows": ROWS}))
    (tmp_path / "run.py").write_text((resources.files("raykd.deploy") / "card/run.py").read_text())
    np.save(tmp_path / "windows.npy", windows.numpy())
    done = subprocess.run(
        [python, "-I", tmp_path / "run.py", tmp_path / "windows.npy"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    sure = (
        said.topk(2).values.diff().abs().squeeze() > 0.01
    )  # an untrained net's near ties may flip
    assert len(lines) == len(windows)
    assert sure.float().mean() > 0.5
    assert [n for (n, _), s in zip(lines, sure, strict=True) if s] == [
        NAMES[i] for i in said.argmax(1)[sure]
    ]
    np.testing.assert_allclose([float(p) for _, p in lines], said.amax(1), atol=0.02)


def test_the_environment_holds_nothing_of_ours(python):
    asked = [python, "-I", "-c", "import raykd"]
    assert (
        "No module named 'raykd'"
        in subprocess.run(asked, capture_output=True, text=True, timeout=600).stderr
    )
    asked[-1] = "import torch"
    assert (
        "No module named 'torch'"
        in subprocess.run(asked, capture_output=True, text=True, timeout=600).stderr
    )
