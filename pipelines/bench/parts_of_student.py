"""A language student in parts on two workers against one process: losses, and bytes of state.

Two processes on this machine, over gloo.
"""

import json
import multiprocessing
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.bench import bf16_language
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.recipe.tables import Optim
from raykd.training.arm import ONE_PROCESS, World
from raykd.training.loop import train
from raykd.training.pieces import Kind, Sharding, local_of

OPTIM = Optim(steps=10, batch=8, learning_rate=1e-3, evaluate_every=1)
MODEL: dict[str, Any] = {"width": 64, "layers": 4, "heads": 4, "kv_heads": 4, "inner": 176}
KINDS: tuple[Kind, ...] = ("full", "hybrid")


def loss_difference() -> float:
    """The largest difference of a step's loss in parts over one process's."""
    alone = _trained(None, ONE_PROCESS)["losses"]
    apart = 0.0
    for kind, told in _two_workers().items():
        pairs = list(zip(told[0]["losses"], alone, strict=True))
        found = max(abs(a - b) / b for a, b in pairs)
        print(f"shard_loss_difference: {found:.1e} of {kind}, {len(pairs)} steps")
        apart = max(apart, found)
    return apart


def memory_ratio() -> float:
    """Bytes of parameters, gradients and optimiser on the worker that has more, over all bytes."""
    whole = _trained(None, ONE_PROCESS)["bytes"]
    return max(one["bytes"] for told in _two_workers().values() for one in told) / whole


@cache
def _two_workers() -> dict[str, list[dict[str, Any]]]:
    """What both workers of each kind told."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(rank, folder)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        files = {kind: [Path(folder) / f"{kind}-{rank}" for rank in range(2)] for kind in KINDS}
        return {kind: [json.loads(f.read_text()) for f in found] for kind, found in files.items()}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for kind in KINDS:
        (Path(folder) / f"{kind}-{rank}").write_text(json.dumps(_trained(kind, World(rank, 2))))
    dist.destroy_process_group()


def _student() -> Adapter:
    torch.manual_seed(0)
    return Adapter(Llama(classes=bf16_language.VOCAB, steps=bf16_language.STEPS, **MODEL))


def _trained(kind: Kind | None, world: World) -> dict[str, Any]:
    """The losses of a training, and the bytes of its state here after the last step."""
    state = train(
        bf16_language.ARM,
        OPTIM,
        _student(),
        bf16_language.device_rows(),
        lambda _: {},
        world=world,
        sharding=Sharding(kind, _student) if kind else None,
    )
    values = _values(state.learner)
    for slots in state.optimizer.state.values():
        values += slots.values()
    size = sum(local_of(value).nbytes for value in values)
    return {"losses": [point["loss"] for point in state.history], "bytes": size}


def _values(learner: nn.Module) -> list[Tensor]:
    """Its parameters and their gradients."""
    parameters = list(learner.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None)]
