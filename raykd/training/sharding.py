"""A student whose parameters, gradients and optimiser state lie in parts on the workers (FSDP2).

It has a twin for every other use: the whole student, whose weights are in memory only while
something reads them, such as validation.
"""

import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from raykd.errors import Problem, RecipeError
from raykd.models.adapter import Adapter, call, field
from raykd.models.recompute import blocks_of
from raykd.training.arm import World
from raykd.training.checkpoints import Part
from raykd.training.pieces import KEY, Sharding, local_of, workers_of_parts


class Shards:
    """A student in parts among the workers, and the whole one beside it."""

    def __init__(self, sharding: Sharding, student: Adapter, world: World, device: torch.device):
        self.student = student
        self.mesh = _mesh(sharding, world, device)
        self.token = world.told(uuid.uuid4().hex[:8], device)[0]
        self.in_parts = sharding.again()
        self.in_parts.module.load_state_dict(student.module.state_dict())
        self.in_parts.head = student.head

    def part(self, learner: nn.Module) -> None:
        """Leave to this worker its part of a learner of `in_parts`, and nothing of the student."""
        for value in chain(learner.parameters(), learner.buffers()):
            dist.broadcast(value.detach(), 0)
        part(learner, blocks_of(self.in_parts.module), self.mesh)
        self.learner = learner
        self._free()

    @property
    def rank(self) -> int:
        """Which of the parts this worker has."""
        return self.mesh.get_local_rank(self.mesh.ndim - 1)

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def own(self) -> Part | None:
        """This worker's part of a checkpoint; None of a worker that has the part of another."""
        if self.mesh.ndim > 1 and self.mesh.get_local_rank(0) > 0:
            return None
        return Part(self.rank, self.count, self.token)

    def clip(self, parameters: Sequence[Tensor], most: float) -> Tensor:
        """The norm of the whole gradient, which is then scaled down to `most`."""
        gradients = [local_of(p.grad) for p in parameters if p.grad is not None]
        square = nn.utils.get_total_norm(gradients).double().square().to(self.mesh.device_type)
        dist.all_reduce(square, group=self.mesh.get_group(self.mesh.ndim - 1))
        norm = square.sqrt().float()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def set_reduced(self, is_last: bool) -> None:
        """Whether the next backward pass sums the gradients of all workers."""
        assert isinstance(self.learner, FSDPModule)
        self.learner.set_requires_gradient_sync(is_last)

    def fill(self) -> None:
        """Give the whole student the weights of all workers; all of them must ask for it."""
        whole = dict(self.student.module.named_parameters())
        for name, value in self.in_parts.module.named_parameters():
            found = value.full_tensor() if isinstance(value, DTensor) else value
            whole[name].data = found.detach().clone()
        buffers = dict(self.student.module.named_buffers())
        for name, value in self.in_parts.module.named_buffers():
            buffers[name].copy_(value)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the whole student has its weights; all workers must enter it together."""
        self.fill()
        yield
        self._free()

    def _free(self) -> None:
        for value in self.student.module.parameters():
            value.data = value.data.new_empty(0)


def part(root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Leave to this process its part of every block's parameters, then of all others."""
    for block in dict.fromkeys(blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def _mesh(sharding: Sharding, world: World, device: torch.device) -> DeviceMesh:
    """The workers that have the parts: a row, or several with copies of each other's."""
    ranks = workers_of_parts(sharding.kind, world, device)
    if sharding.kind == "full":
        return DeviceMesh(device.type, ranks[0], mesh_dim_names=("part",))
    return DeviceMesh(device.type, ranks, mesh_dim_names=("copy", "part"))


def check_parts(module: nn.Module, inputs: Tensor, mask: Tensor) -> None:
    """RecipeError where a student cannot be trained in parts on rows like these; it is changed."""
    for name, value in module.named_parameters():
        if value.dim() == 0:
            raise _refused(module, f"{name} is a single number; make it a tensor of one row")
    blocks = dict.fromkeys(blocks_of(module))
    owner: dict[nn.Parameter, nn.Module | None] = {}
    for block in blocks:
        for name, value in block.named_parameters():
            if owner.setdefault(value, block) is not block:
                raise _refused(module, f"{name} belongs to several blocks; give each its own")
    inside = {id(part) for block in blocks for part in block.modules()}
    for path, part_of in module.named_modules():
        for name, value in part_of.named_parameters(recurse=False):
            if id(part_of) not in inside and value in owner:
                raise _refused(module, f"{path}.{name} belongs to a block, too; give each its own")
    if not dist.is_initialized():
        _check_gradients(module, list(blocks), inputs, mask)


def _check_gradients(
    module: nn.Module, blocks: Sequence[nn.Module], inputs: Tensor, mask: Tensor
) -> None:
    """RecipeError where a student's gradients are others once it lies in parts, in this process."""
    model = _Summed(module)
    model(inputs, mask).backward()
    whole = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad()
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():  # of views, which are harmless unless gradients differ
            warnings.simplefilter("ignore", UserWarning)
            part(model, blocks, DeviceMesh("cpu", [0]))
            model(inputs, mask).backward()
        parted = {name: value.grad for name, value in model.named_parameters()}
        differing = [name for name in whole if not _equal(whole[name], parted[name])]
    except Exception as error:  # of any kind: it is the user's code
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"it fails in parts ({lines[0]}); let blocks read their own parameters alone"
        raise _refused(module, text) from None
    finally:
        dist.destroy_process_group()
    if differing:
        text = f"{differing[0].partition('.')[2]} has another gradient in parts"
        raise _refused(module, f"{text}; let blocks read their own parameters alone")


def _equal(whole: Tensor | None, parted: Tensor | None) -> bool:
    """Whether two gradients are one, up to the rounding of equal sums."""
    if whole is None or parted is None:
        return whole is parted
    near = 1e-5 * float(whole.abs().max()) + 1e-12
    return bool((local_of(parted) - whole).abs().max() <= near)


class _Summed(nn.Module):
    """The sum of a module's logits, each times a number of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        logits = field(call(self.module, inputs, mask), "logits")
        assert logits is not None
        return (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()


def _refused(module: nn.Module, what: str) -> RecipeError:
    text = f"{type(module).__name__} cannot lie in parts: {what}, or leave scale.shard out"
    return RecipeError([Problem(KEY, text)])
