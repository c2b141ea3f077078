"""LoHa: W + s·(A₁B₁ ⊙ A₂B₂).  Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2."""

from math import prod
from typing import Any, Literal

from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Param

from .lycoris import Term, TermConfig, core_product, is_effective

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHaConfig(TermConfig):
    """Low-rank Hadamard product, of rank r² at most. Hyeon-Woo et al. 2021, arXiv:2108.06098.

    `r` is the rank of each of the two products and s = alpha / r; `rank_pattern`, `alpha_pattern`, `layers_to_transform`
    and `layers_pattern` are as in LoraConfig. `rank_dropout` drops outputs of the change while training and scales up
    the others, `module_dropout` all of the change at a site. `use_effective_conv2d`: the kernel of a convolution has
    tensors of its own (section 2.3). `init_weights=False`: a random start, which changes the model.

    Example: LoHaConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    """

    peft_type: Literal["LOHA"] = "LOHA"
    init_weights: bool = True


class Loha(Term[LoHaConfig]):
    """The kernel of a convolution belongs to the columns."""

    name, spec, local = "loha", LoHaConfig, "oi"
    keys = (*_NAMES, "hada_t1", "hada_t2")

    def params(self, spec: LoHaConfig, site: WeightSite) -> dict[str, Param]:
        r, effective = spec.rank_for(site.name), is_effective(spec, site)
        columns = site.in_features // site.groups * (1 if effective else prod(site.kernel_size))
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

    def term(self, p: Any) -> Tensor:
        if p.effective:
            one, other = (
                core_product(p.hada_t1, p.hada_w1_a, p.hada_w1_b),
                core_product(p.hada_t2, p.hada_w2_a, p.hada_w2_b),
            )
            return one * other
        return (p.hada_w1_a @ p.hada_w1_b) * (p.hada_w2_a @ p.hada_w2_b)
