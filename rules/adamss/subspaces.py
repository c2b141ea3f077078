"""The subspaces of a weight: its singular vectors, and clusters of their rows."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.errors import RuleError


def decomposed(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first `rank` left (out, r) and right (r, in) singular vectors, by the random method with this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        left, _, right = torch.svd_lowrank(weight, q=rank, niter=2)
    return left, right.mT


def clusters(rows: Tensor, count: int) -> list[Tensor]:
    """The places of the rows of each of `count` clusters. Raises RuleError without scikit-learn."""
    try:
        cluster: Any = importlib.import_module("sklearn.cluster")
    except ImportError:
        raise RuleError("AdaMSS clusters with scikit-learn: pip install 'peftc[adamss]'") from None
    # The numbers are peft's, whose files don't say which row is in which cluster.
    means = cluster.KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit_predict(rows.float().cpu().numpy()))
    return [torch.where(labels == number)[0] for number in range(count)]


def directions(rows: Tensor, rank: int, threshold: float | None) -> Tensor:
    """The right singular vectors (rank, r) of a cluster's `rows`: no more than it has rows, and, with a `threshold`, than
    squared singular values above that share of the largest.
    """
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    if threshold is not None:
        rank = min(rank, int((values.square() > threshold * values[0].square()).sum()))
    return right[: max(1, rank)]


def padded(factor: Tensor, rank: int) -> Tensor:
    """`factor` (k, r) with rows of zeros up to `rank`."""
    return F.pad(factor, (0, 0, 0, rank - len(factor)))
