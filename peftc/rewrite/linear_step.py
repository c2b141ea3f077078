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


class _LinearStep(torch.autograd.Function):
    """A second derivative computes anew what was kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Sequence[How], *factors: Tensor
    ) -> Tensor:
        rows = _rows(x)
        y, kept = F.linear(rows, weight, bias), list[Tensor | None]()
        for (scale, share), down, up in zip(how, factors[::2], factors[1::2], strict=True):
            mask = None if share is None else drawn(rows, share)
            bits = None if mask is None else packed(mask)
            inner = F.linear(rows if mask is None else mask.mul_(rows), down.to(x.dtype))
            y.addmm_(inner, up.to(y.dtype).t(), alpha=_factor(scale, share))
            kept += inner, bits
        ctx.how = how
        ctx.save_for_backward(x, weight, *factors, *kept)
        # No view, so that who gets it may write to it.
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, *saved = ctx.saved_tensors
        count = 2 * len(ctx.how)
        factors, kept, needs = saved[:count], saved[count:], ctx.needs_input_grad[4:]
        rows, of_y = _rows(x), _rows(gradients[0])
        of_x = of_y @ weight if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for i, (scale, share) in zip(range(0, count, 2), ctx.how, strict=True):
            (down, up), (inner, bits) = factors[i : i + 2], kept[i : i + 2]
            wide, factor = down.to(x.dtype), _factor(scale, share)
            mask = None if bits is None else unpacked(bits, rows)
            seen = rows if mask is None else rows * mask
            if torch.is_grad_enabled():
                inner = F.linear(seen, wide)
            of_inner = of_y @ up.to(x.dtype)
            if of_x is not None and mask is None:
                of_x.addmm_(of_inner, wide, alpha=factor)
            elif of_x is not None:
                of_x.addcmul_(of_inner @ wide, mask, value=factor)
            found.append(_scaled(of_inner.t(), seen, factor, down.dtype) if needs[i] else None)
            found.append(_scaled(of_y.t(), inner, factor, up.dtype) if needs[i + 1] else None)
        return None if of_x is None else of_x.view(x.shape), None, None, None, *found


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _factor(scale: float, share: float | None) -> float:
    """What the product is scaled with: dropout makes up for what it drops."""
    return scale if share is None else scale / share


def _scaled(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · left · right, of which no op but the product takes any time."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale).to(dtype)
