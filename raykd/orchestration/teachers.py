"""Ray: teachers as actors beside the workers that train, for students that write their own text."""

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd import data
from raykd.data.table import Source
from raykd.errors import InfraError
from raykd.files import faults
from raykd.generation.sampling import FrozenTeacher
from raykd.models.build import build_frozen
from raykd.models.device import device_of
from raykd.models.form import Form, set_matmul
from raykd.orchestration.cluster import placed
from raykd.recipe import imports
from raykd.recipe.recipe import Recipe
from raykd.signals import Headed, Signals
from raykd.teacher.identity import check_teacher, teacher_identity

TICK_S = 0.5  # that an answer is waited for at a time


class TeacherActor:
    """A teacher, loaded once, that scores the texts it is sent in turn."""

    def __init__(self, recipe: Recipe, shape: dict[str, int], wanted: dict[str, Any]):
        assert recipe.teacher is not None
        imports.permit(recipe.packages)
        torch.set_num_threads(1)
        self.device = device_of(recipe)
        self.calls = 0
        set_matmul(recipe.precision)
        form = Form.of_teacher(recipe.precision, self.device)
        module = build_frozen(recipe.teacher, shape, form, key="teacher")
        check_teacher(recipe, wanted)
        self.teacher = FrozenTeacher(module)

    def answer(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Rows (B, T, 2) -> logits (B, T, V), or the hidden states (B, T, D) that a head takes."""
        self.calls += 1
        faults.point("teach", call=self.calls)
        rows = torch.from_numpy(inputs.copy()).to(self.device)
        said = self.teacher.signals(rows)
        values = said.logits if said.headed is None else said.headed.hidden
        return _floats(values)

    def head(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
        """(weight (V, D), bias (V,) or None) of a head that answers leave out; None without one.

        It is known once a text has been scored.
        """
        name = self.teacher.adapter.head
        if name is None:
            return None
        head: Any = self.teacher.module.get_submodule(name)
        return _floats(head.weight), None if head.bias is None else _floats(head.bias)


def _floats(values: Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy()


class ServedTeacher:
    """A teacher in an actor, as one worker asks it. A large head is sent once, not its products.

    At most `most` texts wait at once; the next one waits for the oldest. A call that is not
    answered within `wait_s` seconds, restarts of the actor included, is an InfraError. `tick` is
    called as long as one is waited for.
    """

    def __init__(
        self, name: str, *, most: int, wait_s: float, tick: Callable[[], None] = lambda: None
    ):
        import ray

        self.actor = ray.get_actor(name)
        self.most = most
        self.wait_s = wait_s
        self.tick = tick
        self.waiting: deque[Any] = deque()
        self.head: tuple[Tensor, Tensor | None] | None = None
        self.is_known = False  # whether the actor has been asked for its head

    def ask(self, inputs: Tensor) -> Callable[[], Signals]:
        """Send rows (B, T, 2) to the actor; the function that is given waits for its answer."""
        while len(self.waiting) >= self.most:
            self._answer(self.waiting[0])
        call = self.actor.answer.remote(inputs.cpu().numpy())
        self.waiting.append(call)
        return lambda: self._signals(self._answer(call), inputs.device)

    def _signals(self, answer: NDArray[np.float32], device: torch.device) -> Signals:
        values = torch.from_numpy(answer.copy()).to(device)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=device)
        if not self.is_known:
            head = self._answer(self.actor.head.remote())
            self.head = None if head is None else _on_device(head, device)
            self.is_known = True
        if self.head is None:
            return Signals(values, mask)
        return Signals.of_head(Headed(values, *self.head), mask)

    def _answer(self, call: Any) -> Any:
        import ray

        end = time.monotonic() + self.wait_s
        while not ray.wait([call], timeout=min(TICK_S, max(0.0, end - time.monotonic())))[0]:
            self.tick()
            if time.monotonic() >= end:
                raise InfraError(
                    f"the teacher's actor gave no answer within {self.wait_s} s; is it starved?"
                )
        answer: Any = ray.get(call)
        if call in self.waiting:
            self.waiting.remove(call)
        return answer


def _on_device(
    head: tuple[NDArray[np.float32], NDArray[np.float32] | None], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    weight, bias = head
    on_device = torch.from_numpy(weight.copy()).to(device)
    return on_device, None if bias is None else torch.from_numpy(bias.copy()).to(device)


@contextmanager
def teacher_actors(recipe: Recipe, source: Source | None = None) -> Iterator[list[str]]:
    """The names of `scale.scorers` teacher actors that live as long as this; lost ones restart.

    They take no CPU of Ray's accounts, because the workers that wait for them hold those.
    """
    import ray

    rows = source or data.open_source(recipe.data, recipe.optim.order, task=recipe.task)
    shape = rows.table().shape
    wanted = teacher_identity(recipe)
    recipe = placed(recipe)
    actor = ray.remote(
        num_cpus=0,
        num_gpus=1 if recipe.scale.device == "cuda" else 0,
        max_restarts=recipe.scale.retries,
        max_task_retries=-1,  # calls to a lost node fail at once; how long is waited is bounded
    )(TeacherActor)
    names = [f"raykd-teacher-{uuid.uuid4().hex[:12]}" for _ in range(recipe.scale.scorers[0])]
    started: list[Any] = [actor.options(name=name).remote(recipe, shape, wanted) for name in names]
    try:
        yield names
    finally:
        for handle in started:
            ray.kill(handle)
