"""A recipe of tens of steps over the shipped gestures, and what makes a search of it."""

from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "gesture"
TINY = f"""
name = "tiny"
[data]
stride = 40
label_fraction = 0.5
[teacher]
weights = "{EXAMPLE / "teacher.safetensors"}"
settings = {{ width = 96, layers = 3, heads = 4 }}
[student.settings]
width = 8
layers = 1
[store]
rows_per_shard = 512
[optim]
steps = 40
batch = 32
evaluate_every = 10
input_noise = 0.03
[scale]
checkpoint_every = 10
"""
SEARCH = """
[search]
trials = 3
grace = 20
"terms.kd.temperature" = { uniform = [1.0, 4.0] }
"optim.learning_rate" = { loguniform = [1e-3, 1e-2] }
"""
