"""The products of several adapters at once, each on the rows of its own group, as one op that autograd knows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.rewrite.products import is_plain


def batched_products(
    y: Tensor | None, x: Tensor, scale: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> Tensor:
    """y + scale · x · downᵀ · upᵀ of every group, or that without y.

    y (groups, n, out), x (groups, n, in), scale (groups, 1, 1); of every group a down (r, in) and an up (out, r). Each gets
    its gradient as one piece of a stack, not as a copy of that.
    """
    if is_plain(x) and type(downs[0]) in (Tensor, torch.nn.Parameter):
        return _Products.apply(y, x, scale, *downs, *ups)  # pyright: ignore[reportUnknownMemberType, reportReturnType]
    down, up = torch.stack(list(downs)), torch.stack(list(ups))
    delta = torch.bmm(torch.bmm(x, down.mT) * scale, up.mT)
    return delta if y is None else y + delta


class _Products(torch.autograd.Function):
    """Autograd alone would give every gradient transposed, and copy it. A second derivative computes what was kept anew."""

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x: Tensor, scale: Tensor, *factors: Tensor) -> Tensor:
        down, up = _stacks(factors)
        inner = torch.bmm(x, down.mT).mul_(scale)
        ctx.save_for_backward(x, scale, down, up, inner, *factors)
        return torch.bmm(inner, up.mT) if y is None else torch.baddbmm(y, inner, up.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (of_y,) = gradients
        x, scale, down, up, inner, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():
            down, up = _stacks(factors)
            inner = torch.bmm(x, down.mT) * scale
        of_inner = torch.bmm(of_y, up) * scale
        needs = ctx.needs_input_grad
        of_x = torch.bmm(of_inner, down) if needs[1] else None
        half, none = len(factors) // 2, (None,) * (len(factors) // 2)
        of_downs = torch.bmm(of_inner.mT, x).unbind() if any(needs[3 : 3 + half]) else none
        of_ups = torch.bmm(of_y.mT, inner).unbind() if any(needs[3 + half :]) else none
        return of_y if needs[0] else None, of_x, None, *of_downs, *of_ups


def _stacks(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    half = len(factors) // 2
    return torch.stack(list(factors[:half])), torch.stack(list(factors[half:]))
