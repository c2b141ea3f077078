"""A linear op with the products that adapters add to it, as one op that autograd knows.

Of the six products of an adapter in a training step the two that are as large as x and y are added in place, and what is
kept beside x and the factors themselves is of their rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.rewrite.masks import drawn, packed, unpacked

# The factor of an adapter's product, and the share of the numbers of x that its dropout keeps, where it drops any.
How = tuple[float, float | None]


def linear_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Sequence[How], factors: Sequence[Tensor]
) -> Tensor:
    """x · weightᵀ + bias + scale · dropout(x) · downᵀ · upᵀ of every adapter; gradients to x and the factors alone.

    x (…, in) contiguous, weight (out, in); of every adapter a down (r, in) and an up (out, r). Factors of another dtype are
    cast to that of x, and once more in the backward pass; their gradients are of their own.
    """
    return _LinearStep.apply(x, weight, bias, how, *factors)  # pyright: ignore[reportUnknownMemberType, reportReturnType]


def by_rows(x: Tensor) -> Tensor:
    """`x` (…, n) as (rows, n)."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


class _LinearStep(torch.autograd.Function):
    """A second derivative computes anew what was kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Sequence[How], *factors: Tensor
    ) -> Tensor:
        rows = by_rows(x)
        y, kept = F.linear(rows, weight, bias), list[Tensor | None]()
        for (scale, share), down, up in zip(how, factors[::2], factors[1::2], strict=True):
            mask = None if share is None else drawn(rows, share)
            bits = None if mask is None else packed(mask)
            inner = F.linear(rows if mask is None else mask.mul_(rows), _cast(down, x.dtype))
            y.addmm_(inner, _cast(up, x.dtype).t(), alpha=_factor(scale, share))
            kept += inner, bits
        ctx.how = how
        ctx.save_for_backward(x, weight, *factors, *kept)
        if x.dim() == 2:
            return y
        # No view, so that who gets it may write to it.
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, *saved = ctx.saved_tensors
        count = 2 * len(ctx.how)
        factors, kept, needs = saved[:count], saved[count:], ctx.needs_input_grad[4:]
        rows, of_y = by_rows(x), by_rows(gradients[0])
        of_x = of_y @ weight if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for i, (scale, share) in zip(range(0, count, 2), ctx.how, strict=True):
            (down, up), (inner, bits) = factors[i : i + 2], kept[i : i + 2]
            wide, factor = _cast(down, x.dtype), _factor(scale, share)
            mask = None if bits is None else unpacked(bits, rows)
            seen = rows if mask is None else rows * mask
            if torch.is_grad_enabled():
                inner = F.linear(seen, wide)
            of_inner = of_y @ _cast(up, x.dtype)
            if of_x is not None and mask is None:
                of_x.addmm_(of_inner, wide, alpha=factor)
            elif of_x is not None:
                of_x.addcmul_(of_inner @ wide, mask, value=factor)
            found.append(_scaled(of_inner.t(), seen, factor, down) if needs[i] else None)
            found.append(_scaled(of_y.t(), inner, factor, up) if needs[i + 1] else None)
        return None if of_x is None else of_x.view(x.shape), None, None, None, *found


def _cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor if factor.dtype is dtype else factor.to(dtype)


def _factor(scale: float, share: float | None) -> float:
    """What the product is scaled with: dropout makes up for what it drops."""
    return scale if share is None else scale / share


def _scaled(left: Tensor, right: Tensor, scale: float, like: Tensor) -> Tensor:
    """scale · left · right with the shape and dtype of `like`, of which no op but the product takes any time."""
    if like.dtype is left.dtype:
        return torch.addmm(like, left, right, beta=0, alpha=scale)  # With 0, its numbers are not read.
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale).to(like.dtype)
