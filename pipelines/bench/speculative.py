"""What speculative decoding buys on one thread at batch 1: real drafts, a teacher of 20 M
parameters.

    python -m pipelines.bench.speculative [--quick] [--out runs/bench] [--teacher DIR --student DIR]

Plain decoding with the teacher's cache is 1. The pair is built for an acceptance of 0.8 (pairs.py
says how), or read from two of Hugging Face's folders. The number of drafts is that of the largest
predicted speed-up, by the acceptance of a trial and by costs of the models' calls alone: a
drafter's for one token (c) and a teacher's for gamma + 1 (v), over a teacher's for one. Speed-ups
are of CPU time with all that decoding does, in turns, one prompt a round.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.bench import pairs
from pipelines.bench.table import Figure, figure, show
from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder, OnnxReader
from raykd.generation.reader import Reader, TorchReader
from raykd.generation.speculative import WrittenText, generate, predicted_speedup, speculate
from raykd.models.llama import Llama

# of the built pair; drafts a call in the trial
ACCEPTANCE = 0.8
TRIAL = 4
GAMMAS = tuple(range(1, 11))
# where costs are measured: tokens read before, drafts in a row
PAST = 48
DRAFTED = 5


@dataclass(frozen=True)
class Size:
    """How much is trained, decoded and repeated."""

    steps: int = 300
    prompts: int = 9
    tokens: int = 48
    rounds: int = 7  # of costs


QUICK = Size(steps=20, prompts=2, tokens=16, rounds=2)


@dataclass(frozen=True)
class Costs:
    """The drafter's call for a token, and the teacher's by number of tokens, over the teacher's for
    one.
    """

    draft: float
    verify: dict[int, float]

    def speed_up(self, acceptance: float, gamma: int) -> float:
        return predicted_speedup(acceptance, gamma, self.draft, self.verify[gamma + 1])


@dataclass(frozen=True)
class Row:
    """A pair that has decoded every prompt plainly and by drafts:

    CPU seconds (rounds,) a token, and the texts.
    """

    name: str
    plain: NDArray[np.float64]
    drafted: NDArray[np.float64]
    texts: list[WrittenText]
    gamma: int
    costs: Costs

    @property
    def text(self) -> WrittenText:
        """All rounds as one."""
        rounds = tuple(done for text in self.texts for done in text.rounds)
        calls, drafts = (
            sum(getattr(t, f"{side}_calls") for t in self.texts) for side in ("teacher", "drafter")
        )
        return WrittenText(
            [token for t in self.texts for token in t.tokens], "count", calls, drafts, rounds
        )

    @property
    def predicted_speedup(self) -> float:
        return self.costs.speed_up(self.text.acceptance, self.gamma)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="where corpus and drafter are kept"
    )
    parser.add_argument("--teacher", type=Path, help="a Hugging Face folder, with --student")
    parser.add_argument("--student", type=Path, help="a Hugging Face folder, with --teacher")
    options = parser.parse_args()
    if (options.teacher is None) != (options.student is None):
        parser.error("--teacher and --student go together")
    torch.set_num_threads(1)
    size = QUICK if options.quick else Size()
    if options.teacher:
        pair = pairs.read(options.teacher, options.student, prompts=size.prompts)
    else:
        pair = pairs.built(
            options.out, acceptance=ACCEPTANCE, steps=size.steps, prompts=size.prompts
        )
    print(
        f"{pair.described}\n1 thread, torch {torch.__version__}, {size.prompts} prompts, "
        f"{size.tokens} tokens each"
    )
    teacher = TorchReader(pair.teacher)
    drafter = TorchReader(pair.drafter)
    rows = [decoded("both in torch", teacher, drafter, pair, size)]
    rows += [decoded("both in torch, greedy", teacher, drafter, pair, size, temperature=0.0)]
    quick_drafter = _file(pair.drafter)
    quick_teacher = _file(pair.teacher)
    rows += [decoded("drafter in onnxruntime", teacher, quick_drafter, pair, size)]
    rows += [decoded("both in onnxruntime", quick_teacher, quick_drafter, pair, size)]
    told(rows)
    show(figures(rows))


def decoded(
    name: str,
    teacher: Reader,
    drafter: Reader,
    pair: pairs.Pair,
    size: Size,
    *,
    temperature: float = 1.0,
) -> Row:
    """Every prompt plainly and by drafts in turns, by the best number of drafts for this pair."""
    costs = costs_of(teacher, drafter, pair.prompts[0], size.rounds)
    more = {"temperature": temperature, "vocab": pair.vocab}
    trial = speculate(
        teacher, drafter, pair.prompts[-1], 2 * size.tokens, gamma=TRIAL, seed=1000, **more
    )
    gamma = max(GAMMAS, key=lambda g: costs.speed_up(trial.acceptance, g))
    plain = []
    drafted = []
    texts = []
    for seed, prompt in enumerate(pair.prompts):
        spent, text = _timed(
            lambda p=prompt, s=seed: generate(teacher, p, size.tokens, seed=s, **more)
        )
        plain.append(spent / len(text.tokens))
        spent, text = _timed(
            lambda p=prompt, s=seed: speculate(
                teacher, drafter, p, size.tokens, gamma=gamma, seed=s, **more
            )
        )
        drafted.append(spent / len(text.tokens))
        texts.append(text)
    return Row(name, np.array(plain), np.array(drafted), texts, gamma, costs)


@torch.inference_mode()
def costs_of(teacher: Reader, drafter: Reader, prompt: Sequence[int], rounds: int) -> Costs:
    """Medians of CPU time over rounds in which every call takes its turn, so that each finds the
    others' caches.
    """
    past = (list(prompt) * PAST)[:PAST]
    counts = [1, *(g + 1 for g in GAMMAS)]
    spent = np.empty((rounds + 1, len(counts) + 1))
    for turn in spent:
        for i, count in enumerate(counts):
            turn[i] = _call(teacher, past, count, 1)
        turn[-1] = _call(drafter, past, 1, DRAFTED) / DRAFTED
    *teachers, drafters = np.median(spent[1:], axis=0)
    return Costs(
        drafters / teachers[0], {n: t / teachers[0] for n, t in zip(counts, teachers, strict=True)}
    )


def told(rows: Sequence[Row]) -> None:
    """Print each way's speed, what it took and what was predicted."""
    head = (
        "",
        "tokens/s",
        "plain",
        "speed-up",
        "acceptance",
        "stayed",
        "tokens/call",
        "gamma",
        "c",
        "v",
        "predicted",
    )
    print("\n" + f"{head[0]:<24}" + "".join(f"{name:>12}" for name in head[1:]))
    for row in rows:
        text = row.text
        rates = [1 / np.median(spent) for spent in (row.drafted, row.plain)]
        cells = [
            *rates,
            float(np.median(row.plain / row.drafted)),
            text.acceptance,
            text.accepted_share,
        ]
        cells += [
            text.block_efficiency,
            row.gamma,
            row.costs.draft,
            row.costs.verify[row.gamma + 1],
            row.predicted_speedup,
        ]
        print(f"{row.name:<24}" + "".join(f"{cell:>12.3f}" for cell in cells))
    print(
        f"v for 2 to {GAMMAS[-1] + 1} tokens: "
        + ", ".join(f"{rows[0].costs.verify[g + 1]:.2f}" for g in GAMMAS)
    )


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Speed-ups over plain decoding by the same teacher, and over what the formula says."""
    names = ("", "_greedy", "_ort_drafter", "_ort")
    bars = {"": (">= 1.8", ">= 0.85")}
    found = []
    for name, row in zip(names, rows, strict=True):
        ratios = row.plain / row.drafted
        bar = bars.get(name, ("", ""))
        baseline = f"plain decoding, acceptance {row.text.acceptance:.3f}"
        found.append(
            figure(
                f"spec_speedup{name}",
                baseline,
                ratios,
                bar=bar[0],
                floor=f"{row.predicted_speedup:.2f} predicted",
            )
        )
        found.append(
            figure(
                f"spec_model{name}",
                "the formula's",
                ratios / row.predicted_speedup,
                bar=bar[1],
                floor="1",
            )
        )
    return found


def _file(module: Llama) -> OnnxReader:
    return OnnxReader(Decoder(write_decoder.to_onnx(copy.deepcopy(module))))


def _call(reader: Reader, past: Sequence[int], count: int, calls: int) -> float:
    """CPU seconds of `calls` calls for `count` tokens each, after a past that is not counted."""
    if reader.length < PAST:
        reader.rollback(0)
        reader.step(past)
    reader.rollback(PAST)
    started = time.process_time()
    for _ in range(calls):
        reader.step(past[:count])
    return time.process_time() - started


def _timed(call: Callable[[], WrittenText]) -> tuple[float, WrittenText]:
    started = time.process_time()
    text = call()
    return time.process_time() - started, text


if __name__ == "__main__":
    main()
