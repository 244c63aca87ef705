"""What each term costs: a training step's CPU time against `vanilla`'s, and the bytes a row that
the store grows by.

    python -m pipelines.bench.terms [--quick] [--out DIR]

The student and teacher are the gesture quickstart's; every term of every technique is added to
labels and kd alone.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import raykd
from pipelines.bench.table import Clock, Figure, figure, show
from raykd import techniques
from raykd.files.open import open_place
from raykd.files.place import Place
from raykd.losses.terms import needs_of
from raykd.recipe import toml
from raykd.recipe.recipe import Recipe
from raykd.stages.load import resolve
from raykd.store import layer_signals
from raykd.store.reader import Store
from raykd.training.arm import World
from raykd.training.arms import student_arm
from raykd.training.loop import objective_of
from raykd.training.phases import spans
from raykd.training.run_arms import ArmRunner
from raykd.training.state import Learner, State
from raykd.training.step import TrainStep

RECIPE = Path(__file__).parents[2] / "examples" / "gesture" / "few_labels.toml"
ATTENTION = [["blocks.0.attention", "blocks.2.attention"]]
MODES = {
    "attention_scores": {"mode": "scores", "pairs": ATTENTION},
    "attention_activation": {"mode": "activation", "pairs": [["blocks.0", "blocks.2"]]},
}
TURN = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where the store goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = toml.resolve_paths(toml.read_toml(RECIPE), RECIPE.parent)
    recipes = {name: resolve(toml.merge(base, change)) for name, change in cases().items()}
    stores = {name: scored(recipe, options.out) for name, recipe in recipes.items()}
    steps = {name: fresh_step(recipe, stores[name]) for name, recipe in recipes.items()}
    seconds = turns(steps, rounds=4 if options.quick else 40)
    show([*time_figures(seconds), *byte_figures(recipes, stores)])


def cases() -> dict[str, dict[str, Any]]:
    """What each case changes in the vanilla recipe: one more term, or the weighting."""
    found: dict[str, dict[str, Any]] = {"vanilla": {}}
    for technique in techniques.all_techniques():
        for name, spec in technique.recipe["terms"].items():
            if name not in ("ce", "kd"):
                found.setdefault(name, {"terms": {name: spec}})
        if "weighting" in technique.recipe:
            found["weighting"] = {"weighting": technique.recipe["weighting"]}
    plain = found["attention"]["terms"]["attention"]
    found |= {name: {"terms": {"attention": plain | mode}} for name, mode in MODES.items()}
    found["attention_scores"]["student"] = {
        "settings": {"heads": 4}
    }  # scores need the teacher's number of heads
    return found


def scored(recipe: Recipe, out: Path) -> Place:
    """The recipe's store; its teacher runs only for what is not there yet."""
    address = raykd.score(recipe, out)
    assert address
    return open_place(address)


def fresh_step(recipe: Recipe, store: Place) -> TrainStep:
    """A student's training step, before its first."""
    shop = ArmRunner(recipe, store.address, torch.device("cpu"))
    arm = student_arm(recipe, 0)
    optim = recipe.optim
    student = shop.student(arm)
    learner = Learner(student, objective_of(arm, student, shop.train)).train()
    adamw = torch.optim.AdamW(
        learner.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )
    step = TrainStep(arm, optim, shop.train, World(), State(learner, adamw))
    step.enter(spans((), optim.steps)[0])
    return step


def turns(steps: dict[str, TrainStep], rounds: int) -> dict[str, NDArray[np.float64]]:
    """CPU seconds of TURN steps of each case, in every round; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = Clock()
    for _ in range(rounds + 1):
        for name, step in steps.items():
            clock.read()
            for _ in range(TURN):
                step()
                step.state.step += 1
            seconds[name].append(clock.read()[0])
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def time_figures(seconds: dict[str, NDArray[np.float64]]) -> list[Figure]:
    vanilla = seconds.pop("vanilla")
    return [
        figure(f"step_ratio.{n}", "vanilla's step", s / vanilla, bar="", floor="1")
        for n, s in seconds.items()
    ]


def byte_figures(recipes: dict[str, Recipe], stores: dict[str, Place]) -> list[Figure]:
    """Bytes a row of each layer that a case reads, compressed; of vanilla, those of the answers and
    the valence.
    """
    found = []
    for name, recipe in recipes.items():
        places = [
            layer_signals.place_of(stores[name], signal)
            for signal in sorted(needs_of(recipe.terms))
            if "." in signal
        ]
        if name == "vanilla":
            places = [stores[name]]
        manifests = [Store(p).manifest for p in places]
        sizes = [m["bytes"] / sum(record["rows"] for record in m["shards"]) for m in manifests]
        base = (
            "the store's answers, trajectories and saliency"
            if name == "vanilla"
            else "added to vanilla's store"
        )
        found.append(
            figure(f"bytes_per_row.{name}", base, np.array([sum(sizes)]), bar="", floor="")
        )
    return found


if __name__ == "__main__":
    main()
