"""Classify series with this student:  python run.py windows.npy   (a float array (N, steps, channels))."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from raykd.deploy import load_artefact

here = Path(__file__).parent
classes = json.loads((here / "model.json").read_bytes())["classes"]
windows = torch.from_numpy(np.load(sys.argv[1], allow_pickle=False)).float()
with torch.inference_mode():
    logits = load_artefact(here)(windows, torch.ones(windows.shape[:2], dtype=torch.bool)).sequence_logits()
for row in logits.softmax(-1):
    print(f"{classes[int(row.argmax())]}\t{float(row.max()):.3f}")
