"""The teacher store's figures: bytes, gradient error, a student's quality, and what losses and
store cost.

    python -m pipelines.bench.store [--quick] [--out runs/bench] [--plot store.svg]

On a teacher like a language model, of 8192 tokens, twice: flat (4.9 bits) and sharpened (1.8 bits).
Both say what they are made of, and are kept under --out, so that a second run is shorter. One
thread, CPU time, rounds in turns.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.bench import corpus, encodings, fused_cost, plot, store_cost, teachers
from pipelines.bench.corpus import CONTEXT, VOCAB
from pipelines.bench.gradients import Judge, Point, error_at, smallest
from pipelines.bench.language import Language
from pipelines.bench.quality import School
from pipelines.bench.table import Figure, figure, show


@dataclass(frozen=True)
class Size:
    """How much of everything: rows to distil on and to judge by, steps of training, seeds, blocks
    and rounds.
    """

    rows: int = 256
    held: int = 64
    teacher_steps: int = 320
    warm_steps: int = 200  # to a divergence of 2.3 from the flat teacher
    steps: int = 96
    seeds: int = 2
    blocks: int = 8
    rounds: int = 9
    shards: int = 5
    ingest_rounds: int = 60
    combs: tuple[int, ...] = (
        6,
        8,
        10,
        12,
        16,
        20,
        22,
        23,
        24,
        25,
        35,
        50,
        70,
        80,
        90,
        100,
        150,
        200,
        255,
    )
    draws: tuple[int, ...] = (12, 25, 50, 100, 200)
    all_rivals: bool = True


LATE = 400  # steps
ROOM = 40  # bytes a token, of the quality that is asked for
QUICK = Size(64, 16, 40, 120, 32, 1, 4, 3, 2, 25, (10, 16, 50, 150), (12, 50, 100), False)


@dataclass(frozen=True)
class Setting:
    """What every part of the bench shares."""

    size: Size
    student: Language  # as distillation begins: the state that bytes_* are for
    late: Language  # after LATE steps: its gradients are smaller, and harder to keep
    tokens: Tensor  # (R, T)
    logits: Tensor  # (R, T, V) fp16
    held: tuple[Tensor, Tensor]
    factor: float


def main() -> None:
    options = _options()
    size = QUICK if options.quick else Size()
    setting = prepare(size, options.out)
    torch.set_num_threads(1)
    flat, late_flat = measured(setting, 1.0, "flat")
    sharp, late_sharp = measured(setting, setting.factor, "sharp")
    if options.plot:
        titles = (
            f"flat teacher, {teachers.FLAT_BITS} bits",
            f"sharp teacher, {teachers.SHARP_BITS} bits",
        )
        plot.draw(dict(zip(titles, (flat, sharp), strict=True)), options.plot)
    found = list(encoding_figures("sharp", sharp, late_sharp, ("<= 8", "<= 0.45")))
    found += encoding_figures("flat", flat, late_flat, ("<= 40", "<= 0.70"))
    found += [quality_figure(setting, flat), *loss_figures(size)]
    with tempfile.TemporaryDirectory() as folder:
        show([*found, *cost_figures(setting, Path(folder))])


def prepare(size: Size, out: Path) -> Setting:
    """Corpus, teacher and student, from `out` where they are kept."""
    text = corpus.load(out, rows=size.rows, held=size.held)
    print(text.described)
    neural = teachers.neural(text, out, steps=size.teacher_steps)
    mixture = teachers.Mixture(teachers.NGrams(text.train), neural, text.distil[:: size.rows // 16])
    logits = mixture.logits(text.distil)
    held = mixture.logits(text.held)
    print(
        f"teacher: {mixture.share:.3f} x network of {_count(neural)} + 4-grams of "
        f"{len(text.train) / 1e6:.2f} M "
        f"tokens, {teachers.FLAT_BITS} bits; log-probs x {mixture.sharpening:.3f} for "
        f"{teachers.SHARP_BITS} bits"
    )
    student = teachers.warm_student(text, out, steps=size.warm_steps)
    inputs = [torch.from_numpy(rows[:, CONTEXT:-1].copy()) for rows in (text.distil, text.held)]
    print(
        f"student: {_count(student)}, {logits.shape[:2].numel()} tokens to distil on, "
        f"{held.shape[:2].numel()} held out"
    )
    late = teachers.warm_student(text, out, steps=LATE)
    school = School(student, inputs[0], logits, (inputs[1], held), size.steps)
    print(
        "held-out KL from the flat teacher: the student that gradients are judged by "
        f"{school.start:.2f}, "
        f"the late one {school.divergence(late):.2f}"
    )
    return Setting(size, student, late, inputs[0], logits, (inputs[1], held), mixture.sharpening)


def measured(setting: Setting, factor: float, name: str) -> tuple[list[Point], list[Point]]:
    """Every encoding's bytes and gradient error for one teacher, by the warm student and the late
    one; printed.
    """
    size = setting.size
    data = (setting.tokens, setting.logits, factor, setting.size.blocks)
    warm = Judge(setting.student, *data)
    late = Judge(setting.late, *data)
    chosen = (
        encodings.combs(VOCAB, size.combs)
        + encodings.draws(VOCAB, size.draws)
        + encodings.others(VOCAB)
    )
    points = []
    print(
        f"{f'{name} teacher':<22}{'bytes/token':>12}{'cosine':>10}{'error':>8}"
        f"{'late: cosine':>16}{'error':>8}"
    )
    for encoding in [encodings.full(VOCAB), *chosen]:
        logits = (
            setting.logits[: encodings.SHARD] if encoding.family == "full fp16" else setting.logits
        )
        kept = encodings.stored(encoding, logits, factor=factor)
        p = warm.point(encoding, kept)
        q = late.point(encoding, kept)
        points.append((p, q))
        now, later = (f"{x.cosine.mean():.5f}{x.error.mean():>8.4f}" for x in (p, q))
        print(
            f"{encoding.name:<22}{p.bytes_per_token.mean():>12.1f}{now:>18}{later:>24}", flush=True
        )
    return [p for p, _ in points], [q for _, q in points]


def encoding_figures(
    name: str, points: list[Point], late: list[Point], bars: tuple[str, str]
) -> Iterator[Figure]:
    """Bytes at the cosine that counts, and the comb's error beside random sampling's at the same
    bytes.
    """
    rival = next(p for p in points if p.encoding.name == "DistillKit 128/16")
    known = f"DistillKit 128/16 {rival.bytes_per_token.mean():.0f} at {rival.cosine.mean():.4f}"
    for which, found in ((f"bytes_{name}", points), (f"bytes_{name}_late", late)):
        best = smallest([p for p in found if p.encoding.family == "comb"])
        reached = f"{best.encoding.name} at {best.cosine.mean():.4f}"
        yield figure(which, f"{known}; {reached}", best.bytes_per_token, bar=bars[0], floor="")
    comb = next(p for p in points if p.encoding.name == "comb 50")
    drawn = [p for p in points if p.encoding.family == "RS-KD"]
    ratio = comb.error / error_at(float(comb.bytes_per_token.mean()), drawn)
    yield figure(
        f"error_vs_rs_{name}", "RS-KD at the bytes of comb 50", ratio, bar=bars[1], floor="0"
    )


def quality_figure(setting: Setting, flat: list[Point]) -> Figure:
    """The share of full distillation's gain that the largest comb of ROOM bytes keeps; the others'
    are printed.
    """
    school = School(
        setting.student, setting.tokens, setting.logits, setting.held, setting.size.steps
    )
    full = np.array([school.taught(None, seed) for seed in range(setting.size.seeds)])
    print(
        f"held-out KL, warm start {school.start:.4f}, every class "
        f"{', '.join(f'{kl:.4f}' for kl in full)}"
    )
    small = [p for p in flat if p.encoding.family == "comb" and p.bytes_per_token.mean() <= ROOM]
    comb = max(small, key=lambda p: p.encoding.points).encoding
    rivals = (
        encodings.draws(VOCAB, (12, 50))
        + encodings.others(VOCAB)
        + encodings.combs(VOCAB, (12, 50))
    )
    for rival in rivals if setting.size.all_rivals else []:
        print(
            f"share of the gain, {rival.name}: {school.shares(rival, full).mean():.3f}", flush=True
        )
    kept = school.shares(comb, full)
    print(f"share of the gain, {comb.name}: {kept.mean():.3f}", flush=True)
    return figure("quality_share", f"every class; {comb.name}", kept, bar=">= 0.93", floor="1")


def loss_figures(size: Size) -> Iterator[Figure]:
    """The fused loss's time and memory."""
    spent = fused_cost.seconds(size.rounds)
    naive = spent["naive"]
    fused = spent["fused"]
    plain = spent["cross-entropy"]
    products = float(np.median(spent["products"] / naive))
    more = 2 * fused_cost.PLACES
    times = 1 + size.rounds // 4
    grown = fused_cost.growths(("naive", "fused"), fused_cost.PLACES, times)
    twice = fused_cost.growths(("fused",), more, 1)[0, 0]
    print(
        f"peak growth in MiB: naive {grown[:, 0].mean() / 2**20:.0f}, fused "
        f"{grown[:, 1].mean() / 2**20:.0f}, "
        f"fused of {more} places {twice / 2**20:.0f}"
    )
    yield figure(
        "kd_loss_time",
        "two log_softmax, V = 32k",
        fused / naive,
        bar="<= 0.40",
        floor=f"{products:.2f}",
    )
    yield figure("kd_loss_mem", "the same", grown[:, 1] / grown[:, 0], bar="<= 0.15", floor="0.05")
    yield figure(
        "kd_vs_ce",
        "F.cross_entropy",
        fused / plain,
        bar="<= 1.0",
        floor=f"{np.median(spent['products'] / plain):.2f}",
    )


def cost_figures(setting: Setting, folder: Path) -> Iterator[Figure]:
    """The store's writing and reading."""
    size = setting.size
    data = (setting.student, setting.tokens, setting.logits)
    seconds = store_cost.writing(setting.tokens, VOCAB, folder / "w", rounds=size.shards)
    bare, forward = seconds.T[:2]
    encode, write = seconds.T[2:]
    print(
        f"of a shard's {np.median(forward):.2f} s of forward, encoding "
        f"{np.median(encode / forward):.1%}, "
        f"packing and commit {np.median(write / forward):.1%}"
    )
    decode, mapped, step = store_cost.decoding(*data, rounds=size.rounds).T
    loaded, held = store_cost.ingest(*data, folder / "i", rounds=size.ingest_rounds).T
    print(
        f"decode {1e6 * np.median(decode):.2f} us a token from Parquet, "
        f"{1e6 * np.median(mapped):.2f} from the mapped "
        f"copy, a student's step {1e6 * np.median(step):.0f}"
    )
    bare_forward = "bare forward, 20 M parameters"
    yield figure(
        "writer_ratio", bare_forward, bare / (forward + encode + write), bar=">= 0.95", floor="1"
    )
    yield figure(
        "decode_share", "a step on labels; Parquet", decode / step, bar="<= 0.01", floor="0.0013"
    )
    yield figure(
        "decode_share_mapped",
        "a step on labels; mapped copy",
        mapped / step,
        bar="<= 0.01",
        floor="0.0005",
    )
    yield figure(
        "ingest_share", "one batch held", (loaded - held) / held, bar="<= 0.05", floor="0.0005"
    )


def _count(model: Language) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer tokens, one seed: under two minutes, wider spreads",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="where tokens and weights are kept"
    )
    parser.add_argument(
        "--plot", type=Path, help="an SVG to write: bytes a token against gradient error"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
