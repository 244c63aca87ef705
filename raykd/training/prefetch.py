"""The next batches, made on threads of their own while this one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(number)`, and the next ones begun before they are asked for, one on each of `threads`;
    nothing at `end` or beyond.

    `make` must be a function of its number alone, which threads may call at once: then it makes no
    difference who calls it, or when.
    """

    def __init__(self, make: Callable[[int], T], end: int, threads: int = 1):
        self.make = make
        self.end = end
        self.threads = threads
        # torch counts threads per thread, and sums depend on the count
        self.pool = ThreadPoolExecutor(
            threads, "ahead", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self.begun: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        ready = self.begun.pop(number, None)
        found = ready.result() if ready else self.make(number)
        following = range(number + 1, min(number + 1 + self.threads, self.end))
        for other in self.begun.keys() - set(following):
            self.begun.pop(other).cancel()
        for other in following:
            if other not in self.begun:
                self.begun[other] = self.pool.submit(self.make, other)
        return found

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
