"""LoRA-GA: A and B are singular vectors of the weight's gradient, so that the first step is that of full training.

Wang et al. 2024, arXiv:2407.05000, section 3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import LoraConfig
from .sub_configs import LoraGAConfig


def decide(spec: LoraConfig, states: Mapping[str, Tensor]) -> tuple[LoraConfig, Mapping[str, Any]]:
    """The mean gradient by site, and what the spec says of it."""
    told = spec.lora_ga_config or LoraGAConfig()
    return spec, {site: (gradient, told.direction, told.scale, told.stable_gamma) for site, gradient in states.items()}


def start(weight: Tensor, data: tuple[Tensor, str, str, int], r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r). A randomised SVD: what it draws is torch's to say (manual_seed)."""
    gradient, direction, scale, gamma = data
    gradient = gradient.to(device=weight.device, dtype=weight.dtype)
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    for_a, for_b = _places(direction, r)
    a, values = v.mT[for_a], s[for_b]
    b = u[:, for_b] * values
    if scale == "stable":
        b = b * (weight.shape[0] ** 0.25 / gamma**0.5)
    elif scale == "weight_svd":
        largest = torch.svd_lowrank(weight, q=r, niter=4)[1][0]
        b = b * (largest / values[0]) if values[0] > 0 else b
    elif scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a.contiguous(), b.contiguous()


def _places(direction: str, r: int) -> tuple[Any, Any]:
    """Which of the 2·r leading triplets A and B get."""
    if direction == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    return {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
    }[direction]
