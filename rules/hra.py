"""HRA: W·H with H a product of Householder reflections.  Yuan et al. 2024, arXiv:2405.17484, section 3."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import LayerSelection, Rank

from .rotation import eye, unfit, wide, width


class HRAConfig(LayerSelection):
    """Householder reflections of the inputs. Yuan et al. 2024, arXiv:2405.17484.

    `r` reflections; of an even number, each begins beside its own inverse, so a fresh adapter is the base. `apply_GS`: the
    vectors are made orthogonal to each other first (Gram and Schmidt). `init_weights=False`, or an odd `r`: a random start,
    which changes the model. `bias` trains base biases (`all`, or those of adapted modules).

    Example: HRAConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["HRA"] = "HRA"
    r: Rank = 8
    apply_GS: bool = False  # noqa: N815 - PEFT's name
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"


class HraConv(Rule[HRAConfig]):
    """On convolutions: rows of the weight are reflected with their kernel, by H = I − U·T·Uᵀ of unit vectors U."""

    name, spec, ops, local, identity = "hra", HRAConfig, ("conv2d",), "o", False  # A fresh one changes roundings.
    keys = ("hra_u",)
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}

    def params(self, spec: HRAConfig, site: WeightSite) -> dict[str, Param]:
        # Orthogonal to each other, vectors that are the same have no direction.
        paired = spec.init_weights and spec.r % 2 == 0 and not spec.apply_GS
        return {"hra_u": Param((width(site), spec.r), "rule" if paired else "kaiming_uniform", axes="..")}

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        half = weight.new_empty(shapes["hra_u"][0], shapes["hra_u"][1] // 2)
        nn.init.kaiming_uniform_(half, a=sqrt(5))
        return {"hra_u": half.repeat_interleave(2, dim=1)}

    def constants(self, spec: HRAConfig, site: WeightSite) -> dict[str, Constant]:
        return {"r": spec.r, "orthogonal": spec.apply_GS}

    def check(self, spec: HRAConfig, site: WeightSite) -> str | None:
        if site.weight is None:
            return "its reflections start beside a weight that is a plain parameter"
        if spec.apply_GS and spec.r > width(site):
            return f"apply_GS=True makes r={spec.r} vectors orthogonal in {width(site)} dimensions: choose a smaller r"
        return unfit(site)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        u, t = _reflections(p)
        rows = weight.flatten(1)
        return (rows - rows @ u @ t @ u.mT).reshape(weight.shape)


class Hra(HraConv):
    """On linear sites: the op on Hx."""

    ops = ("linear",)

    def input(self, x: Tensor, p: Any) -> Tensor:
        u, t = _reflections(p)
        return x - F.linear(F.linear(F.linear(x.to(u.dtype), u.mT), t), u)


def _reflections(p: Any) -> tuple[Tensor, Tensor]:
    """U and T: for orthogonal vectors T = 2; else T⁻¹ is the upper triangle of UᵀU, with ½ on the diagonal, which makes
    I − U·T·Uᵀ the product of the reflections in their order.
    """
    u = wide(p.hra_u)
    if p.orthogonal:
        u = torch.linalg.qr(u)[0]
        return u, 2 * eye(u)
    u = u / torch.linalg.vector_norm(u, dim=0)
    return u, torch.linalg.solve_triangular((u.mT @ u).triu(1) + 0.5 * eye(u), eye(u), upper=True)
