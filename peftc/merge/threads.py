"""Tiles computed side by side, each by one thread.

That scales better than threads inside of every small operation, and a tile has the same bits whatever their number.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
# Jobs that are begun before their results are asked for, per thread.
_AHEAD = 4
# The number of torch's threads is the process's: one merge at a time sets it.
_LOCK = threading.RLock()


class Run(Protocol):
    """Does jobs, several at a time, and gives their results in order."""

    def __call__(self, jobs: Iterable[Callable[[], T]], /) -> Iterator[T]: ...


@contextmanager
def side_by_side(device: torch.device) -> Generator[Run]:
    """A Run for tensors on `device`: as many threads as torch uses on the CPU; elsewhere one job after the other."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield _one_by_one
        return
    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with _pool(threads) as run:
                yield run
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _pool(threads: int) -> Generator[Run]:
    pool = ThreadPoolExecutor(threads)

    def run(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        for begun in _ahead((pool.submit(job) for job in jobs), threads * _AHEAD):
            yield begun.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    for job in jobs:
        yield job()


def _ahead(begun: Iterable[T], limit: int) -> Iterator[T]:
    """The items of `begun`, up to `limit` of them drawn before they are asked for."""
    waiting: deque[T] = deque()
    for item in begun:
        waiting.append(item)
        if len(waiting) > limit:
            yield waiting.popleft()
    yield from waiting
