"""The training loop in plain torch, and every arm of a recipe."""
