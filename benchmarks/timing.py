"""Interleaved timing on a noisy machine: paired rounds in random order, medians of paired ratios with their spread."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping


def paired(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    after: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per round of every contender. Each round runs all of them once, in an order of its own.

    The default clock counts this process's CPU time, which other work on the machine does not lengthen. `after`: what to do
    after each run of a contender, untimed.
    """
    put_back = after or {}
    order = random.Random(0)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # Warm up: lazy imports, allocator, caches.
        contenders[name]()
        put_back.get(name, lambda: None)()
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            gc.collect()
            start = clock()
            result = contenders[name]()
            seconds[name].append(clock() - start)
            del result
            put_back.get(name, lambda: None)()
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> str:
    """Median of the paired ratios `of`/`to`, with the quartiles."""
    ratios = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def median_ms(values: list[float]) -> str:
    """Median in milliseconds."""
    return f"{1000 * statistics.median(values):.1f} ms"
