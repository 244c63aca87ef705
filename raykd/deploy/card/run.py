"""Classify series with this student:  python run.py rows.npz   (one line a row: its class and how likely it is)

rows.npz   an array (steps, channels) for each row, of any length: np.savez("rows.npz", *rows)
           or `inputs` (rows, steps, channels) filled up at the end, and `lengths` (rows,) or `mask` (rows, steps)
rows.npy   (rows, steps, channels), rows of one length; or one row (steps, channels)

With --logits FILE.npy the logits (rows, classes) are written, too. model.json says how a row must look. Each row is
answered by itself, so its answer depends on no other. It needs numpy and onnxruntime; where there is no student.onnx,
raykd and torch.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def rows_in(path):
    """(row (steps, channels), its valid steps (steps,)) of each row in a file."""
    held = np.load(path, allow_pickle=False)
    if not hasattr(held, "files"):
        for row in held if held.ndim == 3 else [held]:
            yield row, np.ones(len(row), bool)
    elif "inputs" not in held.files:
        for row in map(held.__getitem__, held.files):
            yield row, np.ones(len(row), bool)
    else:
        inputs = held["inputs"]
        valid = np.ones(inputs.shape[:2], bool)
        if "lengths" in held.files:
            valid &= np.arange(inputs.shape[1]) < held["lengths"][:, None]
        if "mask" in held.files:
            valid &= held["mask"].astype(bool)
        for row, mask in zip(inputs, valid, strict=True):
            length = len(mask) - int(mask[::-1].argmax()) if mask.any() else 0
            yield row[:length], mask[:length]


def checked(number, row, mask, rows):
    """The row as float32, filled up with zeros where this student takes one length. Ends the script if it is unfit."""
    least, most, channels = rows["shortest"], rows["longest"], rows["channels"]
    if row.ndim != 2 or row.shape[1] != channels or not least <= len(row) <= most or not mask.any():
        sys.exit(f"row {number}: {row.shape}; this student takes {least} to {most} steps of {channels} channels")
    if row.dtype.kind not in "fiu" or not np.isfinite(row).all():
        sys.exit(f"row {number}: {row.dtype}, or not finite; give finite numbers in the units of the training data")
    missing = most - len(row) if rows["padding"] == "zeros" else 0
    return np.pad(row.astype(np.float32), ((0, missing), (0, 0))), np.pad(mask, (0, missing))


def onnx_student(path):
    """(row, mask) -> logits (classes,)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums in the order they were measured in
    options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 overflows on x86 without VNNI
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    asked, given = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
    output = "row_logits" if "row_logits" in given else "logits"

    def answer(row, mask):
        feed = {"inputs": row[None], "mask": mask[None]}
        return session.run([output], {name: feed[name] for name in asked})[0][0]  # type: ignore

    return answer


def torch_student():
    """The same of a student that ONNX cannot hold."""
    import torch

    from raykd.deploy import load_artefact

    torch.set_num_threads(1)
    student = load_artefact(HERE)

    def answer(row, mask):
        with torch.inference_mode():
            signals = student(torch.from_numpy(row)[None], torch.from_numpy(mask)[None])
        return signals.sequence_logits()[0].numpy()

    return answer


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[2:3] not in ([], ["--logits"]):
        sys.exit(__doc__)
    model = json.loads((HERE / "model.json").read_bytes())
    student = onnx_student(HERE / "student.onnx") if (HERE / "student.onnx").exists() else torch_student()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore
    logits = []
    for number, (row, mask) in enumerate(rows_in(sys.argv[1])):
        z = student(*checked(number, row, mask, model["rows"])).astype(np.float32)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        print(f"{model['classes'][int(z.argmax())]}\t{p.max():.3f}")
        logits.append(z)
    if sys.argv[2:]:
        with open(sys.argv[3], "wb") as file:
            np.save(file, np.array(logits, np.float32).reshape(-1, len(model["classes"])))
