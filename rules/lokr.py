"""LoKr: W + s·(C ⊗ D), a Kronecker product of factors that are low-rank themselves.

Yeh et al. 2023, arXiv:2309.14859, section 3.2; Edalati et al. 2022, arXiv:2212.10650, section 3.1.
"""

from math import isqrt, prod
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param

from .lycoris import Term, TermConfig, core_product, is_effective


class LoKrConfig(TermConfig):
    """Low-rank Kronecker product. Yeh et al. 2023, arXiv:2309.14859, section 3.2.

    The weight's rows and columns are split into two numbers each, near their roots or near `decompose_factor`: C has the
    first ones, D the second. D is of rank `r` unless that is half of its larger side or more, C only with
    `decompose_both`. s = alpha / r; patterns and layers are as in LoraConfig. `rank_dropout` drops outputs of the change
    while training (and scales up the others with `rank_dropout_scale`), `module_dropout` all of the change at a site.
    `use_effective_conv2d`: the kernel of a convolution has a tensor of its own. `init_weights`: true (C starts as zero),
    "lycoris" (D does), false (a random start, which changes the model).

    Example: LoKrConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    """

    peft_type: Literal["LOKR"] = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    @model_validator(mode="after")
    def _check_factor(self) -> Self:
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(
                f"decompose_factor: got {self.decompose_factor}; give a positive number, or -1 for the root"
            )
        return self


class Lokr(Term[LoKrConfig]):
    """The kernel of a convolution belongs to D."""

    name, spec = "lokr", LoKrConfig
    keys = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def constants(self, spec: LoKrConfig, site: WeightSite) -> dict[str, Constant]:
        outer, inner = _is_whole(spec, site)
        return {**super().constants(spec, site), "whole_outer": outer, "whole_inner": inner}

    def params(self, spec: LoKrConfig, site: WeightSite) -> dict[str, Param]:
        r, kernel = spec.rank_for(site.name), site.kernel_size
        (rows, rows_inner), (columns, columns_inner) = _split(spec, site)
        outer, inner = _is_whole(spec, site)
        zero = {True: "outer", "lycoris": "inner", False: ""}[spec.init_weights]
        one = "zeros" if zero == "outer" else "kaiming_uniform"
        other = "zeros" if zero == "inner" else "kaiming_uniform"
        made: dict[str, Param] = {}
        if outer:
            made["lokr_w1"] = Param((rows, columns), one)
        else:
            made["lokr_w1_a"] = Param((rows, r), one)
            made["lokr_w1_b"] = Param((r, columns), "kaiming_uniform")
        if inner:
            return made | {"lokr_w2": Param((rows_inner, columns_inner, *kernel), other)}
        if is_effective(spec, site):
            # Of two dimensions in peft's files.
            made["lokr_t2"] = Param((r, r, *kernel, *(1,) * (2 - len(kernel))), "kaiming_uniform")
            made["lokr_w2_a"] = Param((r, rows_inner), "kaiming_uniform")
            return made | {"lokr_w2_b": Param((r, columns_inner), other)}
        made["lokr_w2_a"] = Param((rows_inner, r), "kaiming_uniform")
        return made | {"lokr_w2_b": Param((r, columns_inner * prod(kernel)), other)}

    def term(self, p: Any) -> Tensor:
        outer, inner = _factors(p)
        # Of a whole D on a 1d convolution peft's files mean the product in another order: its rows first, then C's.
        order = "ac,bdk->badck" if p.whole_inner and len(p.kernel) == 1 else "ac,bd...->abcd..."
        return torch.einsum(order, outer, inner).flatten(0, 1)

    def change(self, x: Tensor, p: Any) -> Tensor:
        if p.kernel:
            return super().change(x, p)
        outer, inner = _factors(p)
        # (C ⊗ D)x without the product: x as a matrix, D on its rows and C on its columns.
        return torch.einsum("...cd,bd,ac->...ab", x.unflatten(-1, (-1, inner.shape[1])), inner, outer).flatten(-2)


def _factors(p: Any) -> tuple[Tensor, Tensor]:
    """C and D."""
    outer = p.lokr_w1 if p.whole_outer else p.lokr_w1_a @ p.lokr_w1_b
    if p.whole_inner:
        return outer, p.lokr_w2
    return outer, core_product(p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b) if p.effective else p.lokr_w2_a @ p.lokr_w2_b


def _is_whole(spec: LoKrConfig, site: WeightSite) -> tuple[bool, bool]:
    """Whether C and D are one tensor each, not a product of two."""
    r, ((rows, rows_inner), (columns, columns_inner)) = spec.rank_for(site.name), _split(spec, site)
    outer = not (spec.decompose_both and 2 * r < max(rows, columns))
    return outer, 2 * r >= max(rows_inner, columns_inner)


def _split(spec: LoKrConfig, site: WeightSite) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of C and D that make up the rows, and the columns."""
    sizes = (site.out_features, site.in_features // site.groups)
    rows, columns = ((first := _factor(size, spec.decompose_factor), size // first) for size in sizes)
    return rows, columns


def _factor(size: int, near: int) -> int:
    """A divisor of `size`: `near` itself, or else the largest that is not over it, nor over the root."""
    if near > 0 and size % near == 0:
        return near
    limit = isqrt(size) if near < 0 else min(near, isqrt(size))
    return next(n for n in range(limit, 0, -1) if size % n == 0)
