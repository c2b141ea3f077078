"""LoHa: W + s·(A₁B₁ ⊙ A₂B₂).  Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import LayerSelection, PatternedAlpha, PatternedRank, first_match

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHaConfig(LayerSelection, PatternedRank, PatternedAlpha):
    """Low-rank Hadamard product, of rank r² at most. Hyeon-Woo et al. 2021, arXiv:2108.06098.

    `r` is the rank of each of the two products and s = alpha / r; `rank_pattern`, `alpha_pattern`, `layers_to_transform`
    and `layers_pattern` are as in LoraConfig. `use_effective_conv2d`: the kernel of a convolution has tensors of its own
    (section 2.3). `init_weights=False`: a random start, which changes the model.

    Example: LoHaConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    """

    not_implemented: ClassVar[Mapping[str, Any]] = {"rank_dropout": 0.0, "module_dropout": 0.0}

    peft_type: Literal["LOHA"] = "LOHA"
    alpha: float | int = 8
    use_effective_conv2d: bool = False
    init_weights: bool = True

    def scaling_for(self, fqn: str) -> float:
        """s = alpha / r."""
        return first_match(self.alpha_pattern, fqn, self.alpha) / self.rank_for(fqn)

    def respelled(self, names: Mapping[str, str]) -> Self:
        ranks = {re.escape(new): self.rank_for(old) for old, new in names.items()}
        alphas = {re.escape(new): first_match(self.alpha_pattern, old, self.alpha) for old, new in names.items()}
        update = {"layers_to_transform": None, "layers_pattern": None, "rank_pattern": ranks, "alpha_pattern": alphas}
        return super().respelled(names).model_copy(update=update)

    @property
    def goes_by_plain_names(self) -> bool:
        patterned = self.rank_pattern or self.alpha_pattern or self.layers_pattern
        return super().goes_by_plain_names and not patterned


class Loha(Rule[LoHaConfig]):
    """On linear sites and convolutions, whose kernel belongs to the columns."""

    name, spec, ops = "loha", LoHaConfig, ("linear", "conv1d", "conv2d")
    local, additive, scale = "oi", True, "scaling"
    keys = (*_NAMES, "hada_t1", "hada_t2")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "alpha"}

    def params(self, spec: LoHaConfig, site: WeightSite) -> dict[str, Param]:
        r, effective = spec.rank_for(site.name), _is_effective(spec, site)
        columns = site.in_features * (1 if effective else prod(site.kernel_size))
        up, down = ((r, site.out_features) if effective else (site.out_features, r)), (r, columns)
        # Along rows and columns of the weight, where these are its own.
        axes = ("or", "ri") if not site.kernel_size else (None, None)
        zero = "zeros" if spec.init_weights else "normal:0.1"
        inits = dict(zip(_NAMES, ("normal:0.1", "normal", zero, "normal"), strict=True))
        made = {
            name: Param(up if name.endswith("a") else down, init, axes=axes[name.endswith("b")])
            for name, init in inits.items()
        }
        if effective:
            shape = (r, r, *site.kernel_size, *(1,) * (2 - len(site.kernel_size)))  # Of two dimensions in peft's files.
            made |= {name: Param(shape, "normal:0.1") for name in ("hada_t1", "hada_t2")}
        return made

    def constants(self, spec: LoHaConfig, site: WeightSite) -> dict[str, Constant]:
        alpha = first_match(spec.alpha_pattern, site.name, spec.alpha)
        scaling, effective = spec.scaling_for(site.name), _is_effective(spec, site)
        return {"r": spec.rank_for(site.name), "alpha": float(alpha), "scaling": scaling, "effective": effective}

    def check(self, spec: LoHaConfig, site: WeightSite) -> str | None:
        return f"its {site.groups} groups have weights that LoHa's columns don't fit" if site.groups > 1 else None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        if p.effective:
            one, other = _product(p.hada_t1, p.hada_w1_a, p.hada_w1_b), _product(p.hada_t2, p.hada_w2_a, p.hada_w2_b)
            return weight + p.scaling * (one * other).reshape(weight.shape)
        delta = (p.hada_w1_a @ p.hada_w1_b) * (p.hada_w2_a @ p.hada_w2_b)
        return weight + p.scaling * delta.reshape(weight.shape)


def _is_effective(spec: LoHaConfig, site: WeightSite) -> bool:
    return spec.use_effective_conv2d and prod(site.kernel_size) > 1


def _product(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The core (r, r, *kernel) with its sides multiplied by up (r, out) and down (r, in): (out, in, *kernel)."""
    return torch.einsum("ij...,io,jn->on...", core, up, down)


RULES = (Loha(),)
