"""What LoHa and LoKr have in common: a term s·Δ of the weight's own size, with dropouts.  Yeh et al., arXiv:2309.14859."""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Rule
from peftc.specs.selection import LayerSelection, PatternedAlpha, PatternedRank, Share, first_match


class TermConfig(LayerSelection, PatternedRank, PatternedAlpha):
    """s = alpha / r, after the patterns. `rank_dropout` drops rows of Δ while training, `module_dropout` all of it."""

    defaults_of = "LORA"

    alpha: float | int = 8
    rank_dropout: Share = 0.0
    module_dropout: Share = 0.0
    use_effective_conv2d: bool = False


S = TypeVar("S", bound=TermConfig)


class Term(Rule[S]):
    """On linear sites and convolutions."""

    ops = ("linear", "conv1d", "conv2d")
    additive, scale = True, "scaling"
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "alpha"}
    drops = ("rank_dropout", "module_dropout")

    def constants(self, spec: S, site: WeightSite) -> dict[str, Constant]:
        r, alpha = spec.rank_for(site.name), first_match(spec.alpha_pattern, site.name, spec.alpha)
        return {
            "r": r,
            "alpha": float(alpha),
            "scaling": alpha / r,
            "effective": is_effective(spec, site),
            "kernel": site.kernel_size,
            "drops": _drops(spec),
        }

    def slots(self, spec: S, site: WeightSite) -> tuple[str, ...]:
        # Rows can't be dropped in the weight.
        return ("weight",) if site.has_wide_weight and not _drops(spec) else ("output",)

    def term(self, p: Any) -> Tensor:
        """Δ, rows first; what follows is in the order of the weight's elements."""
        raise NotImplementedError

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * self.term(p).reshape(weight.shape)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        change = self.change(x, p) * p.scaling
        return y + (change * self.kept(change, p) if p.drops else change)

    def change(self, x: Tensor, p: Any) -> Tensor:
        """Δx."""
        term = self.term(p)
        return p.op(x, term.reshape(term.shape[0], -1, *p.kernel) if p.kernel else term)

    def kept(self, change: Tensor, p: Any) -> Tensor:
        """Ones for the outputs that are kept, zeros for the others: torch's own dropout would scale up what is kept."""
        ones = change.new_ones(change.shape[-1 - len(p.kernel)])
        rows, all_of_it = (p.rank_dropout(ones) > 0).to(change.dtype), p.module_dropout(ones[:1]) > 0
        if p.drops == "scaled":
            rows = rows / rows.mean().clamp(min=1 / 65536)  # None may be left, which is zero then.
        return (rows * all_of_it).reshape(-1, *(1 for _ in p.kernel))


def _drops(spec: TermConfig) -> str:
    if not spec.rank_dropout and not spec.module_dropout:
        return ""
    return "scaled" if spec.rank_dropout and getattr(spec, "rank_dropout_scale", True) else "plain"


def is_effective(spec: TermConfig, site: WeightSite) -> bool:
    """Whether the kernel of a convolution has a tensor of its own."""
    return spec.use_effective_conv2d and prod(site.kernel_size) > 1


def core_product(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The core (r, r, *kernel) with its sides multiplied by up (r, out) and down (r, in): (out, in, *kernel)."""
    return torch.einsum("ij...,io,jn->on...", core, up, down)
