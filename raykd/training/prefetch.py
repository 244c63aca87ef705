"""The next batch, made on a thread of its own while this one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(number)`, and `make(number + 1)` begun before it is asked for; nothing at `end` or
    beyond.

    `make` must be a function of its number alone: then it makes no difference who calls it, or
    when.
    """

    def __init__(self, make: Callable[[int], T], end: int):
        self.make = make
        self.end = end
        # torch counts threads per thread, and sums depend on the count
        self.pool = ThreadPoolExecutor(
            1, "ahead", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self.next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        ready = self.next
        found = ready[1].result() if ready and ready[0] == number else self.make(number)
        self.next = (
            (number + 1, self.pool.submit(self.make, number + 1)) if number + 1 < self.end else None
        )
        return found

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
