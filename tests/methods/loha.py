"""LoHa: W + s·(A₁B₁ ⊙ A₂B₂).  Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2."""

from math import prod
from typing import Any, Literal

from torch import Tensor

from peftc import Param, Rule
from peftc.specs import LayerSelection, PatternedRank


class LohaConfig(LayerSelection, PatternedRank):
    """`r` is the rank of each of the two products; s = alpha / r."""

    peft_type: Literal["TEST_LOHA"] = "TEST_LOHA"
    alpha: float = 8.0


class Loha(Rule[LohaConfig]):
    name, spec, local, additive = "test_loha", LohaConfig, "oi", True
    ops = ("linear", "conv1d", "conv2d", "conv3d")

    def params(self, spec: LohaConfig, site: Any) -> dict[str, Param]:
        r, kernel = spec.rank_for(site.name), prod(site.kernel_size)
        up, down = (site.out_features, r), (r, site.in_features * kernel)
        axes = ("or", "ri") if kernel == 1 else (None, None)
        inits = {"hada_w1": ("normal:0.1", "normal"), "hada_w2": ("zeros", "normal")}
        return {
            f"{name}_{end}": Param(shape, init, axes=own)
            for name, both in inits.items()
            for end, shape, init, own in zip("ab", (up, down), both, axes, strict=True)
        }

    def constants(self, spec: LohaConfig, site: Any) -> dict[str, Any]:
        return {"scaling": spec.alpha / spec.rank_for(site.name)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        delta = (p.hada_w1_a @ p.hada_w1_b) * (p.hada_w2_a @ p.hada_w2_b)
        return weight + p.scaling * delta.reshape(weight.shape)
