"""What generated code calls for an adapter's skinny products: by rows, added in place, little kept for the backward pass.

These are plain ops that autograd knows, but for a product behind a live dropout. Where a compiler or an exporter looks on,
where tensors are not torch's own (sharded, quantised, fake) or functorch transforms a call, they are the rule's algebra.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.rewrite.linear_step import How, by_rows, linear_step
from peftc.rewrite.masks import drawn, packed, unpacked

# (inner, up, s) of a term s · inner · upᵀ; for inner, (down, dropout) if it is dropout(x) · downᵀ of the op's own input.
Term = tuple[Tensor | tuple[Tensor, nn.Module | None], Tensor, Tensor | float]

# Up to so many rows of bfloat16 are cast to the dtype of the adapter in the place of the adapter to theirs. For one token,
# the products of a linear of width 576 take a quarter so (16 µs, not 77), for 32 a half; a step of 128 takes longer.
FEW = 32

# From so many numbers of x on, a training step takes the op and its products as one for autograd, which adds what they give
# for the gradient of x in place. For 512 rows of 576 it takes a tenth less so; for 64, whose calls cost more than their
# numbers, some percent longer.
LARGE = 2**17


def linear_with_products(x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...]) -> Tensor:
    """x · weightᵀ + bias + all terms, for x (…, in): by rows, which are a view, so that terms are added in place; under
    autocast with x cast once.
    """
    if not is_plain(x) or not x.is_contiguous():
        return _added(F.linear(x, weight, bias), x, terms)
    if _is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not torch.is_grad_enabled():
        # Without autograd a view can be written to, and few calls are all that one token costs.
        y = F.linear(x, weight, bias)
        rows = y.view(-1, y.shape[-1])
        found = _added_in_place(rows, x.view(-1, x.shape[-1]), terms)
        return y if found is rows else found.view(y.shape)
    step = _step(x, weight, bias, terms) if x.numel() >= LARGE else None
    if step is not None:
        return linear_step(x, weight, bias, *step)
    if x.dim() == 2:
        return _added_in_place(F.linear(x, weight, bias), x, terms)
    rows = by_rows(x)
    y = _added_in_place(F.linear(rows, weight, bias), rows, terms)
    return y.view(*x.shape[:-1], y.shape[-1])


def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...]
) -> tuple[list[How], list[Tensor]] | None:
    """How `linear_step` computes it, if it gives the gradients that are asked for and adds in the dtypes that it should."""
    how, factors = list[How](), list[Tensor]()
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or weight.dtype is not x.dtype or torch.autograd.forward_ad._current_level >= 0:
        return None
    for inner, up, scale in terms:
        if not isinstance(inner, tuple):
            return None
        (down, dropout), share = inner, None
        if dropout is not None and dropout.training:
            if not _is_maskable(dropout):
                return None
            share = 1 - dropout.p
        for factor in (down, up):
            fits = factor.dtype is x.dtype or (x.dtype is torch.bfloat16 and not _is_few(x))
            if not fits or factor.dim() != 2 or not is_plain(factor):
                return None
            factors.append(factor)
        how.append((float(scale), share))
    return how, factors


def _is_maskable(dropout: nn.Module) -> TypeGuard[nn.Dropout]:
    """Whether under train() it is a mask on the numbers of its input, and nothing else."""
    hooks = dropout._forward_hooks or dropout._forward_pre_hooks
    return type(dropout) is nn.Dropout and not hooks and 0 < dropout.p < 1


def _added(y: Tensor, x: Tensor, terms: tuple[Term, ...]) -> Tensor:
    for inner, up, scale in terms:
        own = product(x, *inner) if isinstance(inner, tuple) else inner
        y = add_product(y, own, up, scale, fresh=False)
    return y


def _added_in_place(y: Tensor, x: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """The same for rows x (n, in) and y (n, out), which nobody else has."""
    for inner, up, scale in terms:
        own = product(x, *inner) if isinstance(inner, tuple) else by_rows(inner)
        if own.dtype is y.dtype is up.dtype and type(own) is type(y) is Tensor:
            y = y.addmm_(own, up.t(), alpha=float(scale))
        else:
            y = add_product(y, own, up, scale, fresh=True)
    return y


def product(x: Tensor, down: Tensor, dropout: nn.Module | None = None) -> Tensor:
    """dropout(x) · downᵀ, of which the backward pass keeps `x` by reference and, where it drops, one bit for each number.

    In bfloat16, and under autocast, `down` is cast to the dtype of `x`, which has far more numbers. Few rows are cast to
    that of `down`, and those in float16, whose range is too small for the other.
    """
    x, down = _of_one_dtype(x, down, _is_few(x))
    if dropout is None:
        return F.linear(x, down)
    if dropout.training and is_plain(x) and torch.is_grad_enabled() and _is_maskable(dropout):
        return _Dropped.apply(x, down, 1 - dropout.p)
    return F.linear(dropout(x), down)


def convolved(x: Tensor, down: Tensor, dropout: nn.Module | None, options: Mapping[str, Any]) -> Tensor:
    """The convolution of dropout(x) with `down`, with casts as in `product`."""
    x, down = _of_one_dtype(x, down, False)
    return _convolution(down)(x if dropout is None else dropout(x), down, **options)


def _convolution(kernel: Tensor) -> Callable[..., Tensor]:
    return (torch.conv1d, torch.conv2d, torch.conv3d)[kernel.dim() - 3]


def _of_one_dtype(x: Tensor, down: Tensor, few: bool) -> tuple[Tensor, Tensor]:
    """Both in one dtype; `few`: `x` is of so few numbers that it is the one to cast."""
    if x.dtype is down.dtype:
        return x, down
    if _is_autocast(x) or (x.dtype is torch.bfloat16 and not few):
        return x, down.to(x.dtype)
    return x.to(down.dtype), down


def add_product(y: Tensor, inner: Tensor, up: Tensor, scale: Tensor | float, fresh: bool) -> Tensor:
    """y + scale · inner · upᵀ in the dtype of `y`, for y (…, out), inner (…, r) and up (out, r).

    `fresh`: nobody else has `y`, so that it may be added to in place.
    """
    if y.dtype is inner.dtype or (y.dtype is torch.bfloat16 and not _is_few(inner)):
        inner, up = inner.to(y.dtype), up.to(y.dtype)
    if not is_plain(y) or type(inner) is not Tensor or (inner.dtype is not y.dtype and not fresh):
        return (y + F.linear(inner * scale, up)).to(y.dtype)
    if inner.dtype is not y.dtype:
        return y.add_(F.linear(inner, up), alpha=float(scale))
    if fresh and y.dim() == 2:
        return y.addmm_(inner, up.t(), alpha=float(scale))
    return torch.addmm(by_rows(y), by_rows(inner), up.t(), alpha=float(scale)).view(y.shape)


def add_pointwise(y: Tensor, inner: Tensor, up: Tensor, scale: Tensor | float, fresh: bool) -> Tensor:
    """y + scale · (a convolution of one point of inner with up) in the dtype of `y`.

    For y (…, out, …) and inner (…, r, …) with the spatial dimensions of up (out, r, 1, …). `fresh`: as of `add_product`.
    """
    if y.dtype is torch.bfloat16 or y.dtype is inner.dtype:
        inner, up = inner.to(y.dtype), up.to(y.dtype)
    plain = is_plain(y) and type(inner) is Tensor and inner.dtype is y.dtype and not _is_autocast(y)
    if not plain or y.dim() != up.dim() or not y.is_contiguous() or not inner.is_contiguous():
        return (y + _convolution(up)(inner * scale, up)).to(y.dtype)
    to, of, by = y.flatten(2), up.flatten(1).expand(y.shape[0], -1, -1), inner.flatten(2)
    if fresh and not torch.is_grad_enabled():  # Autograd copies what a view has changed.
        return to.baddbmm_(of, by, alpha=float(scale)).view(y.shape)
    return torch.baddbmm(to, of, by, alpha=float(scale)).view(y.shape)


def weight_with_product(
    weight: Tensor, left: Tensor, right: Tensor, scale: Tensor | float, dtype: torch.dtype | None, back: bool
) -> Tensor:
    """weight.to(dtype) + scale · left · right, `back` in the dtype that `weight` has; dtype None: that of the sum.

    In bfloat16 that goes back, the factors are cast, whose product is accumulated in float32 and rounded once with the sum.
    """
    fits = weight.dim() in (2, 3) and weight.shape == (*left.shape[:-1], right.shape[-1]) and left.dim() == right.dim()
    plain = is_plain(weight) and type(left) in (Tensor, nn.Parameter) and type(right) in (Tensor, nn.Parameter)
    if not fits or not plain or _is_autocast(weight):
        total = (weight if dtype is None else weight.to(dtype)) + scale * (left @ right)
        return total.to(weight.dtype) if back else total
    if back and weight.dtype is torch.bfloat16:
        wide = weight
    else:
        wide = weight.to(torch.promote_types(dtype or weight.dtype, left.dtype))
    left, right = (
        one.to(wide.dtype).contiguous() for one in (left, right)
    )  # Else each of a stack is a product of its own.
    # Lying as the weight does: the bits of what is computed of it, a norm, depend on that.
    total = wide.clone() if wide is weight else wide
    total = (total.addmm_ if total.dim() == 2 else total.baddbmm_)(left, right, alpha=float(scale))
    return total.to(weight.dtype) if back else total


def _is_few(x: Tensor) -> bool:
    """Whether `x` (…, n) are few rows, of which a compiler does not ask: it makes one program for any number."""
    return not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1]


def is_plain(tensor: Tensor) -> bool:
    """Whether ops on `tensor` run here and now, on numbers that torch holds itself."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _is_autocast(x: Tensor) -> bool:
    """Whether products of `x` are computed in another dtype."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return known and x.dtype is not torch.float64


class _Dropped(torch.autograd.Function):
    """(x ∘ mask / kept) · downᵀ, for a mask that keeps this share of the numbers: that of F.dropout for the same seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, kept: float) -> Tensor:
        mask = drawn(x, kept)
        ctx.save_for_backward(x, down, packed(mask))
        ctx.kept = kept
        return F.linear(mask.mul_(x), down).div_(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, down, bits = ctx.saved_tensors
        gradient = gradients[0] / ctx.kept
        mask = unpacked(bits, x)
        of_x = (gradient @ down) * mask if ctx.needs_input_grad[0] else None
        of_down = None
        if ctx.needs_input_grad[1]:
            dropped = x * mask
            of_down = gradient.reshape(-1, gradient.shape[-1]).t() @ dropped.reshape(-1, dropped.shape[-1])
        return of_x, of_down, None
