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

import numpy as np
import torch

from pipelines.bench import scoring, training
from pipelines.bench.table import breakdown, figure, show
from raykd import data
from raykd.orchestration import scoring as stream
from raykd.orchestration.session import connect
from raykd.stages.load import load

RECIPE = "examples/gesture/few_labels.toml"
ROUNDS = 12


def main() -> None:
    torch.set_num_threads(1)
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
        shard = scoring.parts(dense, folder)
    steps = np.array(trained["raykd"])[1:] / np.array(trained["by_hand"])[1:]
    cpu, wall = scored.T[:2]
    bare_cpu, bare_wall = scored.T[2:4]
    gap, idle = scored.T[4:]
    breakdown("a training step", {k: 1e3 * v for k, v in trained["parts"].items()}, "ms CPU")
    breakdown("a shard of 1024 rows", {k: 1e3 * v for k, v in shard.items()}, "ms CPU")
    between, waits = 1e3 * np.median([gap, idle], axis=1) / scoring.SHARDS_A_ROUND
    print(f"between two shards {between:.2f} ms wall, idle for {waits:.2f} of them")
    by_hand = "a step by hand"
    bare = "forward, fp16, one zstd Parquet"
    show(
        [
            figure("train_step_ratio", by_hand, steps[:, 0], bar="<= 1.05", floor="1"),
            figure("train_step_ratio_wall", by_hand, steps[:, 1], bar="", floor="1"),
            figure("score_ratio", bare, bare_cpu / (cpu + idle), bar=">= 0.95", floor="1"),
            figure("score_ratio_wall", bare, bare_wall / wall, bar="", floor="1"),
        ]
    )


if __name__ == "__main__":
    main()
