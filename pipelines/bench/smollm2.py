"""SmolLM2-135M as a teacher in fp32 and bf16, and a step of its student, with and without logits.

    python -m pipelines.bench.smollm2 [--rows 32] [--rounds 3]

It wants the files that examples/smollm2/make_teacher.py writes. The last line is JSON:

* score_tokens_per_second_fp32, score_tokens_per_second_bf16: of CPU, through the whole scorer (the
  forward pass, valence, the comb codec); a processor without bf16 units imitates them
* store_kl_bf16: nats a token, KL(p of fp32 || p of bf16) of the teacher's distributions
* store_size_ratio: bytes of the answers from bf16 over those from fp32
* student_step_seconds, student_step_seconds_whole: CPU of a step of 8 rows of 128 tokens, the head
  walked or multiplied out, as it was before
* student_step_mib, student_step_mib_whole: how far the step lets the peak of memory grow
"""

import argparse
import json
from typing import Any

import numpy as np
import torch

from pipelines.bench import step_memory
from pipelines.bench.table import Clock, machine
from raykd import data
from raykd.data import Rows
from raykd.signals import Signals, log_softmax
from raykd.stages.load import load
from raykd.teacher.scorer import Header, Scorer

RECIPE = "examples/smollm2/recipe.toml"
CASES = ("smollm2", "smollm2 whole")


def scorer_of(precision: str, limit: int) -> tuple[Scorer, Rows]:
    """The teacher in a precision, and its first rows of training."""
    recipe = load(RECIPE, (f"precision.teacher={precision!r}", f"data.limit={limit}"))
    dataset = data.load(recipe.data)
    return Scorer(recipe, Header.of(recipe, dataset)), dataset.splits["train"]


def scoring(limit: int, rounds: int) -> dict[str, float]:
    """Tokens a second in turns, and how far the two answers are apart."""
    made = {name: scorer_of(name, limit) for name in ("fp32", "bf16")}
    rows = made["fp32"][1]
    tokens = int(rows.mask.sum())
    clock = Clock()
    spent: dict[str, list[float]] = {name: [] for name in made}
    size: dict[str, int] = {}
    for _ in range(rounds):
        for name, (scorer, _) in made.items():
            clock.read()
            table = scorer.table(rows)
            spent[name].append(clock.read()[0])
            size[name] = table.column("logits").nbytes
    figures = {
        f"score_tokens_per_second_{name}": tokens / float(np.median(seconds))
        for name, seconds in spent.items()
    }
    apart = distance(made["fp32"][0], made["bf16"][0], rows)
    return figures | {"store_kl_bf16": apart, "store_size_ratio": size["bf16"] / size["fp32"]}


@torch.inference_mode()
def distance(exact: Scorer, near: Scorer, rows: Rows) -> float:
    """Mean KL(p || q) in nats a token of two teachers' distributions."""
    total = 0.0
    count = 0
    for first in range(0, len(rows), 4):
        part = rows.take(slice(first, first + 4))
        inputs = torch.from_numpy(part.inputs)
        mask = torch.from_numpy(part.mask)
        answers: list[Signals] = [scorer.teacher(inputs, mask) for scorer in (exact, near)]
        log_p, log_q = (log_softmax(answer.logits.double())[mask] for answer in answers)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += int(mask.sum())
    return total / count


def student(rounds: int) -> dict[str, float]:
    """CPU seconds and memory of a step, the head walked and multiplied out."""
    walked, whole = np.median(step_memory.times(CASES, rounds), axis=1)
    mib = [step_memory.growth_of(case) / 2**20 for case in CASES]
    return {
        "student_step_seconds": walked,
        "student_step_seconds_whole": whole,
        "student_step_mib": mib[0],
        "student_step_mib_whole": mib[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    figures: dict[str, Any] = scoring(arguments.rows, arguments.rounds)
    figures |= student(arguments.rounds)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
