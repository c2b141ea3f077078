"""Rotations in blocks, by Cayley's transform: what OFT and BOFT are made of.  Qiu et al. 2023, arXiv:2306.07280."""

from typing import Any

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite


def cayley(skew: Tensor) -> Tensor:
    """(I − S)(I + S)⁻¹ for skew-symmetric S (…, b, b): orthogonal."""
    skew = wide(skew)
    one = eye(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def unpacked(packed: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (n, size, size) from their upper triangles."""
    upper = packed.new_ones(size, size, dtype=torch.int64).triu(1)
    places = (upper.flatten().cumsum(0) - 1).clamp(min=0)
    matrices = packed.index_select(1, places).unflatten(1, (size, size)) * upper
    return matrices - matrices.mT


def series(skew: Tensor, terms: int) -> Tensor:
    """I + 2S + 2S² + … + Sⁿ⁻¹, which is (I + S)(I − S)⁻¹ up to an error of that order; four terms are as three in peft."""
    total = eye(skew).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def constrained(packed: Tensor, eps: Any) -> Tensor:
    """Scaled down to matrices of norm `eps` / √n where theirs is larger.  arXiv:2306.07280, section 4.2."""
    norm = torch.linalg.vector_norm(packed, dim=1, keepdim=True) * 2**0.5
    return packed * (eps / packed.shape[0] ** 0.5 / norm.clamp(min=1e-30)).clamp(max=1)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least, as solvers want it."""
    return x * x.new_ones(1, dtype=torch.float32)


def eye(like: Tensor) -> Tensor:
    """The identity (b, b) for a tensor (…, b, b)."""
    return torch.diag_embed(like.new_ones(like.shape[-1]))


def rotated(x: Tensor, blocks: Tensor, shared: bool = False) -> Tensor:
    """x·R along the last dimension; R has the `blocks` (n, b, b) on its diagonal, or one (b, b) again and again."""
    pieces = x.to(blocks.dtype).unflatten(-1, (-1, blocks.shape[-1]))
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


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`, the smaller of two."""
    if wanted >= size:
        return size
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))
