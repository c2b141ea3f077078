"""Task arithmetic on lists of equal tensors: weighted sums of what is left of them after pruning.

ties: Yadav et al. 2023, arXiv:2306.01708, section 3. dare: Yu et al. 2023, arXiv:2311.03099, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.rule import Combination

# combination_type → (how to prune, whether signs are elected).
COMBINE: Mapping[str, tuple[str | None, bool]] = {
    "linear": (None, False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("magnitude", False),
}


def combine_tensors(kind: str, tensors: Sequence[Tensor], weights: Sequence[float], how: Combination) -> Tensor:
    """Σ wᵢ·pruned(tᵢ); with elected signs, the mean over those entries only whose sign is the elected one."""
    pruning, elects = COMBINE[kind]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    stacked = torch.stack([_pruned(tensor.to(wide), pruning, how.density) for tensor in tensors])
    scales = torch.tensor(weights, dtype=wide, device=stacked.device)
    weighted = stacked * scales.reshape(-1, *(1 for _ in stacked.shape[1:]))
    if not elects:
        return weighted.sum(0)
    votes = stacked if how.majority_sign_method == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _pruned(tensor: Tensor, pruning: str | None, density: float | None) -> Tensor:
    """`tensor` with a share of `density` of its entries left: the largest, or random ones scaled up by 1/density."""
    if pruning is None or density is None or density >= 1:
        return tensor
    if pruning == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


_WHAT = "add_weighted_adapter"


def checked(how: Combination, ranks: Sequence[int]) -> Combination:
    """`how`, of adapters of at most these `ranks`, with a rank for all sites where one is taken; for a single adapter the
    exact way. Raises AdapterError on what makes no sense.
    """
    kind = how.combination_type
    if len(ranks) == 1 and how.svd_rank is None:
        return replace(how, combination_type="cat")  # Nothing to combine: the adapter itself, scaled.
    pruned = kind.removesuffix("_svd") not in ("svd", "linear", "cat")
    if pruned and (not _is_share(how.density) or (how.density == 0 and "dare" in kind)):
        raise AdapterError(f"{_WHAT}: {kind!r} needs a density in [0, 1] (dare: above 0), got {how.density!r}")
    if how.majority_sign_method not in ("total", "frequency"):
        raise AdapterError(
            f"{_WHAT}: majority_sign_method={how.majority_sign_method!r}: valid are 'total' and 'frequency'"
        )
    if how.svd_rank is not None and (type(how.svd_rank) is not int or how.svd_rank < 1):
        raise AdapterError(f"{_WHAT}: svd_rank={how.svd_rank!r} is no positive integer")
    if how.svd_clamp is not None and not _is_share(how.svd_clamp):
        raise AdapterError(f"{_WHAT}: svd_clamp={how.svd_clamp} is a quantile, so in [0, 1]")
    if how.svd_driver is not None and not torch.cuda.is_available():
        raise AdapterError(
            f"{_WHAT}: svd_driver={how.svd_driver!r} chooses a CUDA solver, and there is no CUDA device here"
        )
    return replace(how, svd_rank=max(ranks)) if how.svd_rank is None and kind.endswith("svd") else how


def _is_share(number: Any) -> bool:
    return isinstance(number, int | float) and 0 <= number <= 1
