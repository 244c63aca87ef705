"""No distillation: labels only. How a teacher is trained, and what every control is."""

RECIPE = {"terms": {"ce": {"weight": 1.0}}, "control": False}
