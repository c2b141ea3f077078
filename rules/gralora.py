"""GraLoRA: the weight in k × k blocks, each with a low rank of its own.  Jung et al. 2025, arXiv:2505.20355, section 3."""

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule
from peftc.specs.selection import Count, LayerSelection, Rank, Share


class GraloraConfig(LayerSelection):
    """Granular low-rank adaptation. Jung et al. 2025, arXiv:2505.20355.

    `gralora_k`² blocks of the weight have the rank `r` / `gralora_k` each, with as many parameters as LoRA of rank `r`.
    `hybrid_r`: the rank of a LoRA beside them (section 3.4). Both are scaled by alpha / (r + hybrid_r). `bias` trains base
    biases (`all`, or those of adapted modules). `init_weights=False`: a random start, which changes the model.
    `fan_in_fan_out` is informative.

    Example: GraloraConfig(r=32, gralora_k=2, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["GRALORA"] = "GRALORA"
    r: Rank = 32
    hybrid_r: Annotated[int, Field(ge=0)] = 0
    alpha: float | int = 64
    gralora_dropout: Share = 0.0
    gralora_k: Count = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if self.r % self.gralora_k:
            raise ValueError(f"gralora_k={self.gralora_k} does not divide r={self.r}, which the blocks share")
        return self


class Gralora(Rule[GraloraConfig]):
    """On linear sites."""

    name, spec, ops, additive, scale = "gralora", GraloraConfig, ("linear",), True, "scaling"
    keys = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "alpha"}
    drops = ("gralora_dropout",)

    def params(self, spec: GraloraConfig, site: WeightSite) -> dict[str, Param]:
        k, r = spec.gralora_k, spec.r
        rows, columns = site.out_features // k, site.in_features // k
        # As kaiming_uniform is for the factors that are stacked and turned here.
        made = {
            "gralora_A": Param((k, columns, r), f"uniform:{1 / sqrt(columns)}"),
            "gralora_B": Param((k, r, rows), "zeros" if spec.init_weights else f"uniform:{1 / sqrt(r)}"),
        }
        if spec.hybrid_r:
            zero = "zeros" if spec.init_weights else "kaiming_uniform"
            a, b = (spec.hybrid_r, site.in_features), (site.out_features, spec.hybrid_r)
            made["gralora_A_general"] = Param(a, "kaiming_uniform", "gralora_A_general.weight", axes="ri")
            made["gralora_B_general"] = Param(b, zero, "gralora_B_general.weight", axes="or")
        return made

    def constants(self, spec: GraloraConfig, site: WeightSite) -> dict[str, Constant]:
        scaling = spec.alpha / (spec.r + spec.hybrid_r)
        return {
            "r": spec.r,
            "alpha": float(spec.alpha),
            "scaling": scaling,
            "k": spec.gralora_k,
            "hybrid": spec.hybrid_r > 0,
        }

    def check(self, spec: GraloraConfig, site: WeightSite) -> str | None:
        if site.in_features % spec.gralora_k or site.out_features % spec.gralora_k:
            sizes = f"its {site.in_features} inputs and {site.out_features} outputs"
            return f"gralora_k={spec.gralora_k} does not divide {sizes}"
        return None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        a, b = _blocks(p)
        change = torch.einsum("nijs,jnso->joni", a, b).flatten(2).flatten(0, 1)
        return weight + p.scaling * (change + p.gralora_B_general @ p.gralora_A_general if p.hybrid else change)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        a, b = _blocks(p)
        pieces = p.gralora_dropout(x).unflatten(-1, (p.k, -1))
        change = torch.einsum("...jns,jnso->...jo", torch.einsum("...ni,nijs->...jns", pieces, a), b).flatten(-2)
        if p.hybrid:
            change = change + F.linear(F.linear(p.gralora_dropout(x), p.gralora_A_general), p.gralora_B_general)
        return y + change * p.scaling


def _blocks(p: Any) -> tuple[Tensor, Tensor]:
    """A as (n, i, j, s) and B as (j, n, s, o), for the block of columns n and rows j: inputs i, rank s, outputs o."""
    return p.gralora_A.unflatten(2, (p.k, -1)), p.gralora_B.unflatten(1, (p.k, -1))
