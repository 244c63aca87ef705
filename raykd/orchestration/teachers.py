"""Ray: teachers as actors beside the workers that train, for students that write their own text."""

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
from raykd.teacher.identity import check_teacher, teacher_identity


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

    def logits(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Rows (B, T, 2) -> logits (B, T, V)."""
        self.calls += 1
        faults.point("teach", call=self.calls)
        rows = torch.from_numpy(inputs.copy()).to(self.device)
        return self.teacher.logits(rows).float().cpu().numpy()


class ServedTeacher:
    """A teacher in an actor, as one worker asks it.

    At most `most` texts wait at once; the next one waits for the oldest. A call that is not
    answered within `wait_s` seconds, restarts of the actor included, is an InfraError.
    """

    def __init__(self, name: str, *, most: int, wait_s: float):
        import ray

        self.actor = ray.get_actor(name)
        self.most = most
        self.wait_s = wait_s
        self.waiting: deque[Any] = deque()

    def ask(self, inputs: Tensor) -> Callable[[], Tensor]:
        """Send rows (B, T, 2) to the actor; the function that is given waits for the logits."""
        while len(self.waiting) >= self.most:
            self._answer(self.waiting[0])
        call = self.actor.logits.remote(inputs.cpu().numpy())
        self.waiting.append(call)
        return lambda: torch.from_numpy(self._answer(call).copy()).to(inputs.device)

    def _answer(self, call: Any) -> NDArray[np.float32]:
        import ray
        import ray.exceptions

        try:
            logits: Any = ray.get(call, timeout=self.wait_s)
        except ray.exceptions.GetTimeoutError:
            raise InfraError(
                f"the teacher's actor gave no answer within {self.wait_s} s; is it starved?"
            ) from None
        if call in self.waiting:
            self.waiting.remove(call)
        return logits


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
