"""The bench for a CUDA device runs here in small, whatever this machine has."""

import torch

from pipelines.bench.gpu import SMALL, WORKS, measure


def test_every_part_but_the_compiler_gives_its_figures_on_a_cpu():
    found = measure(SMALL, torch.device("cpu"), WORKS.keys() - {"compile"})
    assert list(found) == [key for keys, _ in WORKS.values() for key in keys]
    absent = {key for key, value in found.items() if value is None}
    told = {key for key in found if key.startswith("memory_mb")}
    assert absent == told | {"step_ms_compile", "head_memory_ratio", "syncs_per_step"}
    assert all(value > 0 for value in found.values() if value is not None)
