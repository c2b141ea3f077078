"""Rotations in blocks, by Cayley's transform: what OFT and BOFT are made of.  Qiu et al. 2023, arXiv:2306.07280."""

from typing import Any

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite


def cayley(skew: Tensor) -> Tensor:
    """(I − S)(I + S)⁻¹ for skew-symmetric S (…, b, b): orthogonal."""
    one = eye(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def eye(like: Tensor) -> Tensor:
    """The identity (b, b) for a tensor (…, b, b)."""
    return torch.diag_embed(like.new_ones(like.shape[-1]))


def rotated(x: Tensor, blocks: Tensor, shared: bool = False) -> Tensor:
    """x·R along the last dimension; R has the `blocks` (n, b, b) on its diagonal, or one (b, b) again and again."""
    pieces = x.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("...rk,kc->...rc" if shared else "...rk,rkc->...rc", pieces, blocks).flatten(-2)


def kept(rotations: Tensor, dropout: Any) -> Tensor:
    """The rotations (…, b, b) with some of them replaced by the identity, in training."""
    one = eye(rotations)
    mask = dropout(torch.ones_like(rotations[..., :1, :1])) > 0
    return one + mask * (rotations - one)


def width(site: WeightSite) -> int:
    """How many numbers are rotated: an embedding's dimensions, or all that a row of the weight is of."""
    if site.op == "embedding":
        return site.out_features
    size = site.in_features
    for length in site.kernel_size:
        size *= length
    return size


def unfit(site: WeightSite) -> str | None:
    """Why the files that peft has would not fit a convolution, or None."""
    if site.groups > 1:
        return f"rows of its weight in {site.groups} groups don't have all the inputs that are rotated"
    return "its kernel is not square" if len(set(site.kernel_size)) > 1 else None
