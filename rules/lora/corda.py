"""CorDA: A and B are the parts of the weight that data tell apart.  Yang et al. 2024, arXiv:2406.05223, sections 3.2, 3.3.

With C the covariance of the inputs, W·C = U·S·Vᵀ, so W = U·S·(Vᵀ·C⁻¹), whose leading parts matter most for the data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite

from .config import LoraConfig
from .sub_configs import CordaConfig

# Sum of the covariances of batches, and their number.
State = tuple[Tensor, int]


def told(spec: LoraConfig) -> CordaConfig:
    """What the spec says, or PEFT's defaults."""
    return spec.corda_config or CordaConfig()


def observe(spec: LoraConfig, sites: Sequence[WeightSite], x: Tensor, state: State | None) -> State:
    """The sum with xᵀx, of the rows over their largest entry, as in the authors' code."""
    x = x if told(spec).use_float16_for_covariance else x.float()
    x = x / x.max().abs()
    own = x.mT @ x
    if not bool(own.isfinite().all()):
        raise AdapterError(f"{sites[0].fqn}: its inputs are not finite, or all zero; look at the batches")
    return (own, 1) if state is None else (state[0] + own, state[1] + 1)


def decide(spec: LoraConfig, states: Mapping[str, State]) -> tuple[LoraConfig, Mapping[str, Any]]:
    """The mean covariance by site, and which end of the weight's parts is adapted."""
    means = {id(state): (state[0] / state[1]).float() for state in states.values()}
    return spec, {site: (means[id(state)], told(spec).corda_method) for site, state in states.items()}


def start(weight: Tensor, data: tuple[Tensor, str], r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), so that s·B·A is a part of the weight."""
    covariance, method = data
    covariance = covariance.to(device=weight.device, dtype=weight.dtype)
    damped, inverse = _inverted(covariance)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    own = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    root = torch.sqrt(s[own] / scaling)
    return root[:, None] * (vh @ inverse)[own], u[:, own] * root


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """`covariance` with its diagonal raised until the inverse is one (section 3.2), and that."""
    one, damp = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device), 0.01
    while True:
        raised = covariance + covariance.diagonal().mean() * damp * one
        inverse = torch.linalg.inv(raised)
        if float(torch.dist(raised @ inverse, one)) < 0.05:
            return raised, inverse
        damp *= 2
