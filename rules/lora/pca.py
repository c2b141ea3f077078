"""The leading directions of rows that come in batches: an incremental PCA, with a randomised SVD of fixed seed.

Ross et al. 2008, Incremental learning for robust visual tracking, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_SEED = 42


@dataclass(frozen=True, eq=False)
class Directions:
    """What is known of some inputs: how many rows there were, their mean, their sum of squares about it, the leading
    directions (k, in) with their singular values, and which of them the last batch did not turn.
    """

    rows: int
    mean: Tensor
    squares: Tensor
    directions: Tensor
    values: Tensor
    settled: Tensor

    @property
    def explained(self) -> Tensor:
        """The share of the variance that each direction explains."""
        return self.values**2 / self.squares


def turned(state: Directions | None, x: Tensor, count: int, tau: float) -> Directions:
    """The `count` leading directions after the rows `x`, at least as many; `tau`: the cosine of those that did not turn."""
    x = x.to(torch.float32)
    if state is None:
        mean = x.mean(0, dtype=torch.float64)
        squares = (x - mean).square().sum()
        found, values = _leading(x - mean.to(x.dtype), count)
        return Directions(len(x), mean, squares, found, values, torch.zeros(count, dtype=torch.bool))
    total, own = state.rows + len(x), x.mean(0)
    step = state.mean - own
    correction = ((state.rows / total) * len(x)) ** 0.5 * step
    squares = state.squares + (x - own).double().square().sum() + state.rows * len(x) / total * step.square().sum()
    stacked = torch.cat([state.values[:, None] * state.directions, x - own, correction[None]])
    found, values = _leading(stacked, count)
    mean = (state.rows * state.mean + len(x) * own) / total
    near = F.cosine_similarity(found, state.directions) >= tau
    return Directions(total, mean, squares, found, values, near.cpu())


def _leading(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors, with the largest entry positive, and their values."""
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        _, values, vectors = torch.svd_lowrank(x, q=min(2 * count, *x.shape), niter=4)
    rows = vectors.mT
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return (rows * signs)[:count], values[:count]
