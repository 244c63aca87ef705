"""What raykd costs over plain PyTorch: a training step in a Ray Train worker, a scored row in a Ray
Data actor.

    python -m pipelines.bench.overhead

Both are compared with loops written by hand that take turns with raykd's in the same process, so
that a busy machine slows both alike. The two ratios count CPU time of the whole process, Ray's
threads included, and for scoring the idle time between shards too; the `_wall` ones count wall
time. Evaluation is left out on both sides.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.bench import scoring, training
from pipelines.bench.table import Figure, breakdown, figure, show
from raykd import data
from raykd.orchestration import scoring as stream
from raykd.orchestration.session import connect
from raykd.stages.load import load

RECIPE = "examples/gesture/few_labels.toml"
ROUNDS = 12


def main() -> None:
    torch.set_num_threads(1)
    show(measured(told=True))


def measured(*, told: bool = False) -> list[Figure]:
    """The ratios of one scoring and one training, and of a training by two workers; `told` prints
    where the time goes.
    """
    recipe = load(RECIPE, ("scale.scorers=1", "control=false"))
    steps = recipe.optim.evaluate_every * (ROUNDS + 1)  # the first round warms up
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"steps": steps})})
    dense = recipe.model_copy(update={"data": recipe.data.model_copy(update={"stride": 1})})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        connect()
        scored = scoring.run(dense, folder)
        store = stream.score(recipe, data.open_source(recipe.data), folder)
        trained = training.run(recipe, store, folder)
        by_two = training.run(recipe, store, folder / "two workers", workers=2)
        shard = scoring.parts(dense, folder)
    cpu, wall = scored.T[:2]
    bare_cpu, bare_wall = scored.T[2:4]
    gap, idle = scored.T[4:]
    if told:
        breakdown("a training step", {k: 1e3 * v for k, v in trained["parts"].items()}, "ms CPU")
        breakdown("a shard of 1024 rows", {k: 1e3 * v for k, v in shard.items()}, "ms CPU")
        between, waits = 1e3 * np.median([gap, idle], axis=1) / scoring.SHARDS_A_ROUND
        print(f"between two shards {between:.2f} ms wall, idle for {waits:.2f} of them")
    alone = _ratios(trained)
    shared = _ratios(by_two)
    by_hand = "a step by hand"
    ddp = "a step by hand under DDP"
    bare = "forward, fp16, one zstd Parquet"
    return [
        figure("train_step_ratio", by_hand, alone[:, 0], bar="<= 1.03", floor="1"),
        figure("train_step_ratio_wall", by_hand, alone[:, 1], bar="", floor="1"),
        figure("ddp_step_ratio", ddp, shared[:, 0], bar="<= 1.05", floor="1"),
        figure("ddp_step_ratio_wall", ddp, shared[:, 1], bar="", floor="1"),
        figure("score_ratio", bare, bare_cpu / (cpu + idle), bar=">= 0.95", floor="1"),
        figure("score_ratio_wall", bare, bare_wall / wall, bar="", floor="1"),
    ]


def _ratios(trained: dict[str, Any]) -> NDArray[np.float64]:
    """(rounds, 2): CPU and wall seconds over those of the loop by hand, once it is warm."""
    return np.array(trained["raykd"])[1:] / np.array(trained["by_hand"])[1:]


if __name__ == "__main__":
    main()
