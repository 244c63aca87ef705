"""run.py of an artefact of series, as a process: it takes rows as a device has them."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import CHANNELS, CLASSES, SCHEMES, STEPS, encoder_of, rounding
from torch import Tensor, nn

from pipelines.bench import artefact as bench
from raykd.data.rows import Rows
from raykd.deploy import own_script
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import GateError
from raykd.models.adapter import Adapter
from raykd.recipe.quant import Quant

NAMES = [f"class {number}" for number in range(CLASSES)]
LENGTHS = np.array([*range(1, STEPS + 1)] * 2)


class Pooled(nn.Module):
    """Of whole rows, by the mask."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(CHANNELS, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(inputs)) * mask[..., None]
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))


class Flat(nn.Module):
    """Of one number of steps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(STEPS * CHANNELS, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def folder_of(module: nn.Module, folder: Path, *, free: bool, shortest: int = 1) -> Path:
    example = torch.randn(2, STEPS, CHANNELS)
    file = write_onnx.rows_to_onnx(module, example, free_steps=free)
    (folder / "student.onnx").write_bytes(file)
    rows = {"channels": CHANNELS, "shortest": shortest, "longest": STEPS}
    rows |= {"padding": "none" if free else "zeros"}
    (folder / "model.json").write_text(json.dumps({"classes": NAMES, "rows": rows}))
    card = (resources.files("raykd.deploy") / "card/run.py").read_text()
    (folder / "run.py").write_text(card)
    return folder


def ragged(lengths=LENGTHS) -> Rows:
    count = len(lengths)
    mask = np.arange(STEPS) < lengths[:, None]
    draws = np.random.default_rng(0).normal(size=(count, STEPS, CHANNELS)).astype(np.float32)
    order = np.arange(count)
    inputs = np.where(mask[..., None], draws, np.float32(0))
    return Rows(order, inputs, mask, order % CLASSES, order)


@torch.inference_mode()
def trained_alone(module: nn.Module, rows: Rows, *, cut: bool = True) -> np.ndarray:
    adapter = Adapter(module)
    said = []
    for row, mask in zip(rows.inputs, rows.mask, strict=True):
        steps = mask.sum() if cut else STEPS
        inputs = torch.from_numpy(row[None, :steps].copy())
        said.append(adapter(inputs, torch.from_numpy(mask[None, :steps])).sequence_logits())
    return torch.cat(said).numpy()


@pytest.mark.parametrize("name", [None, "int8-channel", "int4-g32", "ternary-channel"])
def test_a_row_of_any_length_is_answered_as_its_student_answers_it_alone(name, tmp_path):
    rows = ragged()
    expected = trained_alone(encoder_of(SCHEMES.get(name)).eval(), rows)
    folder = folder_of(encoder_of(SCHEMES.get(name)).eval(), tmp_path, free=True)
    answered = own_script.row_logits(folder, rows)
    limit = 1e-5 if name != "int8-channel" else 2e-2  # there a code at a tie may move
    assert np.abs(answered - expected).max() <= limit * np.abs(expected).max()
    if name != "int8-channel":  # whose activations share a range over the call
        session = onnx_session.session(folder / "student.onnx")
        together = onnx_session.row_logits(session, {"inputs": rows.inputs, "mask": rows.mask})
        assert np.abs(together - expected).max() <= limit * np.abs(expected).max()


def test_a_mask_goes_into_the_file_of_a_student_that_takes_one(tmp_path):
    torch.manual_seed(0)
    module = rounding(Pooled(), Quant(weights="ternary", activations="none", skip=[]))
    rows = ragged()
    expected = trained_alone(module, rows)
    answered = own_script.row_logits(folder_of(module, tmp_path, free=True), rows)
    np.testing.assert_allclose(answered, expected, atol=1e-5)


def test_a_student_of_one_number_of_steps_gets_rows_filled_up(tmp_path):
    torch.manual_seed(0)
    module = Flat().eval()
    rows = ragged()
    expected = trained_alone(module, rows, cut=False)
    folder = folder_of(module, tmp_path, free=False)
    np.testing.assert_allclose(own_script.row_logits(folder, rows), expected, atol=1e-5)


def test_steps_that_a_mask_leaves_out_in_between_stay_out_of_the_mean(tmp_path):
    rows = ragged()
    rows.mask[:, 1] &= rows.mask.sum(1) < 4
    assert "mask" in own_script.as_given(rows)
    module = encoder_of(None).eval()
    adapter = Adapter(module)
    with torch.inference_mode():
        signals = adapter(torch.from_numpy(rows.inputs), torch.from_numpy(rows.mask))
    answered = own_script.row_logits(folder_of(module, tmp_path, free=True), rows)
    np.testing.assert_allclose(answered, signals.sequence_logits().numpy(), atol=1e-5)


def test_every_form_of_file_is_one_answer_and_what_is_no_row_is_refused(tmp_path):
    folder = folder_of(encoder_of(None).eval(), tmp_path, free=True, shortest=2)
    whole = ragged(np.full(6, STEPS))
    np.save(tmp_path / "rows.npy", whole.inputs)
    np.savez(tmp_path / "rows.npz", *whole.inputs.astype(np.float64))
    np.savez(tmp_path / "padded.npz", inputs=whole.inputs, lengths=np.full(6, STEPS))
    printed = {printed_by(folder, name)[1] for name in ("rows.npy", "rows.npz", "padded.npz")}
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == 6
    np.save(tmp_path / "row.npy", whole.inputs[0])
    assert len(printed_by(folder, "row.npy")[1].splitlines()) == 1
    unfit = {
        "too long": np.zeros((STEPS + 1, CHANNELS)),
        "too short": np.zeros((1, CHANNELS)),
        "empty": np.zeros((0, CHANNELS)),
        "channels": np.zeros((STEPS, CHANNELS + 1)),
        "not finite": np.full((STEPS, CHANNELS), np.nan),
    }
    for name, row in unfit.items():
        np.savez(tmp_path / "unfit.npz", whole.inputs[0], row)
        code, _, error = printed_by(folder, "unfit.npz")
        assert code == 1
        assert error.startswith("row 1: "), name
    assert printed_by(folder)[0] == 1
    np.savez(tmp_path / "none.npz")
    assert logits_of_nothing(folder, tmp_path / "none.npz").shape == (0, CLASSES)


def logits_of_nothing(folder: Path, path: Path) -> np.ndarray:
    """What a script writes of a file without rows; it prints nothing, and all is well."""
    written = folder / "logits.npy"
    command = [sys.executable, "-I", folder / "run.py", path, "--logits", written]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return np.load(written)


def printed_by(folder: Path, *names: str) -> tuple[int, str, str]:
    command = [sys.executable, "-I", folder / "run.py", *(folder / name for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_script_that_fails_prints_otherwise_or_hangs_is_no_artefacts(tmp_path):
    folder = folder_of(encoder_of(None).eval(), tmp_path, free=True)
    rows = ragged(np.array([3, 4]))
    script = (folder / "run.py").read_text()
    (folder / "run.py").write_text(script.replace("z.argmax()", "z.argmin()"))
    with pytest.raises(GateError, match="printed others than it wrote"):
        own_script.row_logits(folder, rows)
    (folder / "run.py").write_text("import sys\nsys.exit('no such file')\n")
    with pytest.raises(GateError, match="ended with 1: no such file; no artefact was written"):
        own_script.row_logits(folder, rows)
    (folder / "run.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(GateError, match="did not answer within 1 s"):
        own_script.run(folder, limit_s=1)


def test_run_py_decides_as_the_report_says_on_every_test_row(tmp_path):
    """Trained, exported, copied away, and started as a user starts it."""
    pairs = [("series_ragged", "fp32"), ("series_ragged", "int8"), ("text", "int8")]
    found = dict(bench.figures(pairs, tmp_path))
    assert found == {f"agreement.{kind}.{width}": 1.0 for kind, width in pairs}
    folder = tmp_path / "series_ragged-fp32" / "artefact"
    rows = json.loads((folder / "model.json").read_bytes())["rows"]
    assert (rows["shortest"], rows["longest"], rows["channels"]) == (1, 29, 4)
    assert rows["seen"] == {"shortest": 5, "longest": 29}
    assert rows["padding"] == "none"
    assert "* **Steps**: 1 to 29." in (folder / "README.md").read_text()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["format"] == "onnx fp32"
    assert manifest["answered_by"] == "run.py"
