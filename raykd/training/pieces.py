"""Tensors of which a process has some rows, as of a student in parts (`sharding.py`), and whole
ones, by the same calls.

What makes such tensors takes seconds to import, so it is not imported here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
from torch import Tensor

from raykd.errors import Problem, RecipeError
from raykd.models.adapter import Adapter
from raykd.training.arm import World
from raykd.training.checkpoints import Extent
from raykd.training.state_file import Stored

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

KEY = "scale.shard"
Kind = Literal["full", "hybrid"]


@dataclass(frozen=True)
class Sharding:
    """Over which workers a student lies in parts: all of them, or those of a node.

    `again` gives a student like the one that is trained, with values of any kind.
    """

    kind: Kind
    again: Callable[[], Adapter]


def workers_of_parts(kind: Kind, world: World, device: torch.device) -> list[list[int]]:
    """The workers that have the parts of a student, in rows of those that have all of them.

    RecipeError on every worker where nodes have unequal numbers of workers and it is hybrid.
    """
    if kind == "full":
        return [list(range(world.size))]
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(world.told(world.node, device)):
        ranks.setdefault(node, []).append(rank)
    if len({len(found) for found in ranks.values()}) > 1:
        told = ", ".join(f"{node} has {len(found)}" for node, found in ranks.items())
        text = (
            f'"hybrid" wants as many workers on every node, and {told}; set scale.workers to a '
            'number that gives them, or write "full"'
        )
        raise RecipeError([Problem(KEY, text)])
    return list(ranks.values())


def is_in_parts(value: Tensor) -> "TypeGuard[DTensor]":
    """Whether this process has only some rows of a tensor."""
    return hasattr(value, "to_local")


def local_of(value: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return value.to_local() if is_in_parts(value) else value


def extent_of(value: Tensor) -> Extent | None:
    """Which rows of a tensor this process has; None where it has them all."""
    if not is_in_parts(value):
        return None
    mesh = value.device_mesh
    rows = value.shape[0]
    each = -(-rows // mesh.size(mesh.ndim - 1))
    first = min(rows, each * mesh.get_local_rank(mesh.ndim - 1))
    return Extent(first, first + value.to_local().shape[0])


def rows_like(value: Tensor, stored: Stored, name: str) -> Tensor:
    """A stored tensor in parts as `value` is, of which this process reads its own."""
    extent = extent_of(value)
    if extent is None or not is_in_parts(value):
        return stored[name]
    local = value.to_local()
    return type(value).from_local(
        stored.rows(name, extent.first, extent.last).to(local.device),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


@torch.no_grad()
def put_rows(values: Mapping[str, Tensor], stored: Stored, prefix: str) -> None:
    """Fill tensors, whole or in parts, with this process's part of those that are stored."""
    for name, value in values.items():
        local_of(value).copy_(local_of(rows_like(value, stored, prefix + name)))


@torch.no_grad()
def put(values: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or in parts, with what this process has of others."""
    for name, value in values.items():
        local_of(value).copy_(local[name])
