"""Classify series with this student:  python run.py windows.npy   (a float array (N, steps, channels)).

It needs numpy and onnxruntime, nothing else.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

here = Path(__file__).parent
classes = json.loads((here / "model.json").read_bytes())["classes"]
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 overflows on x86 without VNNI
student = onnxruntime.InferenceSession(str(here / "student.onnx"), options, providers=["CPUExecutionProvider"])
for window in np.load(sys.argv[1], allow_pickle=False).astype(np.float32):
    z = np.asarray(student.run(["logits"], {"inputs": window[None]})[0]).reshape(-1, len(classes)).mean(0)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    print(f"{classes[int(p.argmax())]}\t{p.max():.3f}")
