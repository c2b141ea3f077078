"""Task arithmetic on lists of equal tensors: weighted sums of what is left of them after pruning.

ties: Yadav et al. 2023, arXiv:2306.01708, section 3. dare: Yu et al. 2023, arXiv:2311.03099, section 3.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
