"""What rounding buys on this CPU: size and speed of files, what training under it costs, and how
alike the answers are.

    python -m pipelines.bench.edge [--quick] [--run RUN]

One thread; medians of CPU time over rounds that take turns. The encoder has 4 layers of 256
channels over 100 steps, the language model 6 of 384 with 8,192 tokens and a past of 128; their
weights are random, which changes neither size nor speed. `--run` names a run folder with an
unrounded arm: its student is rounded every way without training, and its accuracy told on real test
rows. torchao and ExecuTorch join where their extras are installed.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipelines.bench.edge_rivals import OURS, Row, cpu_seconds, rows_for, speed_ups
from pipelines.bench.table import Figure, figure, show
from raykd import data, models
from raykd.deploy.latency import cpu_flags
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder
from raykd.files.atomic import read_json
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Recipe
from raykd.training import phases

STEPS = 100
CHANNELS = 9
CLASSES = 6
PAST = 128
TOKENS = 16
WIDTHS = {
    "int8": "int8 per tensor",
    "int8_channel": "int8 per channel",
    "int4": "int4 g32",
    "ternary": "ternary",
}
TERNARY = Quant(weights="ternary", per="group", group=32, embeddings="int4", skip=[])
EAGER = "fp32, torch eager"
FP32 = "fp32, onnxruntime"
INT8 = "ours int8 per channel, onnxruntime"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument(
        "--run", type=Path, help="a run folder whose unrounded student is rounded every way"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 4 if options.quick else 30
    print(f"1 thread, {cpu_flags()}, torch {torch.__version__}")
    if options.run:
        student = student_rows(options.run)
        told("the run's student, rounded without training", student, cpu_seconds(student, rounds))
    rows = rows_for(encoder(), torch.randn(1, STEPS, CHANNELS))
    lms = decoders()
    seconds = cpu_seconds(rows, rounds)
    decoding = cpu_seconds(lms, rounds, calls=1)
    told("encoder, batch 1", rows, seconds)
    told(f"language model, {TOKENS} tokens one by one after {PAST}, batch 1", lms, decoding)
    show(
        [
            *encoder_figures(rows, seconds),
            *decode_figures(lms, decoding),
            training_figure(rounds),
            *parity_figures(),
        ]
    )


def encoder() -> SeriesEncoder:
    torch.manual_seed(0)
    sizes = {"width": 256, "layers": 4, "heads": 8, "expansion": 4}
    return SeriesEncoder(channels=CHANNELS, classes=CLASSES, steps=STEPS, **sizes)  # type: ignore[arg-type]


def student_rows(run: Path) -> list[Row]:
    """Every way to run the student that was trained in full precision, on the test rows of its
    data.
    """
    recipe = Recipe.model_validate(read_json(run / "recipe.json"))
    dataset = data.load(recipe.data)
    module = models.build_model(recipe.student.bare, **dataset.shape, key="student")
    weights = run / "arms" / f"unrounded-{recipe.seeds[0]}" / "weights.safetensors"
    models.load_weights(module, weights, "student")
    test = dataset.splits["test"]
    return rows_for(module, torch.from_numpy(test.inputs[:1].copy()), test)


def decoders() -> list[Row]:
    """The language model token by token: as torch runs it with its cache, and as onnxruntime does,
    fp32 and ternary.
    """
    torch.manual_seed(0)
    module = Llama(
        classes=8192, steps=256, width=384, layers=6, heads=6, kv_heads=6, inner=1536, tied=False
    ).eval()
    ternary = copy.deepcopy(module)
    phases.round_as(ternary, TERNARY)
    size = 4 * sum(p.numel() for p in module.parameters())
    files = [write_decoder.to_onnx(copy.deepcopy(module)), write_decoder.to_onnx(ternary)]
    calls = [_torch_decoding(module), _onnx_decoding(files[0]), _onnx_decoding(files[1], lut=True)]
    sizes = [size, *map(len, files)]
    return [
        Row(*row, None)
        for row in zip((EAGER, FP32, "ternary, onnxruntime"), sizes, calls, strict=True)
    ]


def _torch_decoding(module: Llama) -> Callable[[], torch.Tensor]:
    cache = module.cache(1)
    tokens = torch.randint(8192, (1, PAST + TOKENS))

    @torch.inference_mode()
    def call() -> torch.Tensor:
        cache.length = PAST
        return torch.stack(
            [module(tokens[:, i : i + 1], cache)["logits"] for i in range(PAST, PAST + TOKENS)]
        )

    with torch.inference_mode():
        module(tokens[:, :PAST], cache)
    return call


def _onnx_decoding(file: bytes, *, lut: bool = False) -> Callable[[], torch.Tensor]:
    decoder = Decoder(file, lut=lut)
    tokens = np.random.default_rng(0).integers(8192, size=(1, PAST + TOKENS))
    decoder.step(tokens[:, :PAST])

    def call() -> torch.Tensor:
        decoder.rollback(PAST)
        said = [decoder.step(tokens[:, i : i + 1]) for i in range(PAST, PAST + TOKENS)]
        return torch.from_numpy(np.stack(said))

    return call


def told(title: str, rows: Sequence[Row], seconds: NDArray[np.float64]) -> None:
    """Print size, speed and accuracy of each way beside the first."""
    print(f"\n{title}")
    for row, ratios in zip(rows, speed_ups(seconds).T, strict=True):
        accuracy = "" if row.accuracy is None else f"{row.accuracy:10.2%}"
        print(
            f"{row.name:<46}{row.bytes:>12,}{rows[0].bytes / row.bytes:>8.2f}x"
            f"{np.median(ratios):>8.2f}{accuracy}"
        )


def encoder_figures(rows: Sequence[Row], seconds: NDArray[np.float64]) -> list[Figure]:
    """How much faster int8 is, and how much smaller each file."""
    at = {row.name: (row.bytes, spent) for row, spent in zip(rows, seconds.T, strict=True)}
    sizes = {
        width: at[FP32][0] / at[f"ours {name}, onnxruntime"][0] for width, name in WIDTHS.items()
    }
    return [
        figure(
            "int8_encoder_vs_eager",
            "fp32 in eager torch",
            at[EAGER][1] / at[INT8][1],
            bar=">= 1.8",
            floor="",
        ),
        figure(
            "int8_encoder_vs_ort",
            "fp32 in onnxruntime",
            at[FP32][1] / at[INT8][1],
            bar=">= 1.3",
            floor="",
        ),
        *(
            figure(f"size_ratio.{n}", "the fp32 file", np.array([v]), bar="", floor="")
            for n, v in sizes.items()
        ),
    ]


def decode_figures(rows: Sequence[Row], seconds: NDArray[np.float64]) -> list[Figure]:
    eager, fp32, ternary = seconds.T
    size = np.array([rows[1].bytes / rows[2].bytes])
    return [
        figure(
            "ternary_decode_vs_eager",
            "fp32 in eager torch",
            eager / ternary,
            bar=">= 2.5",
            floor="",
        ),
        figure(
            "ternary_decode_vs_ort", "fp32 in onnxruntime", fp32 / ternary, bar=">= 1.5", floor=""
        ),
        figure("size_ratio.ternary_lm", "the fp32 file", size, bar=">= 9", floor=""),
    ]


def training_figure(rounds: int) -> Figure:
    """A step of the encoder under each width against one in full precision: the slowest of them."""
    steps = {"full precision": _step(encoder())}
    for width in WIDTHS.values():
        module = encoder()
        phases.round_as(module, OURS[width])
        steps[width] = _step(module)
    spent = cpu_seconds(
        [Row(n, 0, step, None) for n, step in steps.items()], max(4, rounds // 2), calls=1
    )
    slowest = int(np.argmax(np.median(spent, axis=0)))
    name = f"fp32's step; the slowest is {list(steps)[slowest]}"
    return figure(
        "fakequant_step_ratio", name, spent[:, slowest] / spent[:, 0], bar="<= 1.15", floor="1"
    )


def _step(module: nn.Module) -> Callable[[], torch.Tensor]:
    adamw = torch.optim.AdamW(module.parameters(), 1e-3, fused=True)
    x = torch.randn(16, STEPS, CHANNELS)
    label = torch.randint(CLASSES, (16 * STEPS,))

    def call() -> torch.Tensor:
        adamw.zero_grad()
        loss = F.cross_entropy(module(x)["logits"].flatten(0, 1), label)
        loss.backward()
        adamw.step()
        return loss

    return call


def parity_figures() -> list[Figure]:
    """The difference over the largest logit that 99 rows in 100 stay below, file against training
    module.
    """
    x = torch.randn(200, STEPS, CHANNELS)
    found = []
    for width, name in WIDTHS.items():
        module = encoder().eval()
        phases.round_as(module, OURS[name])
        with torch.inference_mode():
            said = torch.cat([module(row[None])["logits"] for row in x]).numpy()
        session = onnx_session.session(write_onnx.to_onnx(module, x[:2]))
        answered = np.concatenate(
            [session.run(["logits"], {"inputs": row[None].numpy()})[0] for row in x]
        )
        each = np.abs(said - answered).reshape(len(x), -1).max(1) / np.abs(said).max()
        bar = "<= 0.002" if width.startswith("int8") else "<= 0.02"
        tail = np.array([np.quantile(each, 0.99)])
        found.append(
            figure(
                f"parity.{width}", "the module that trains, 99 % of rows", tail, bar=bar, floor="0"
            )
        )
    return found


if __name__ == "__main__":
    main()
