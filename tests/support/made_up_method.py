"""A method that exists nowhere else: a gated rank-one update, y + tanh(g)·u(v·x), declared in one file."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc import AdapterSpec, Param, Rule
from peftc.graph.sites import WeightSite


class GatedConfig(AdapterSpec):
    """`gate` is where g starts; at 0 the adapter is the identity."""

    peft_type: Literal["GATED"] = "GATED"
    gate: float = 0.0


class Gated(Rule[GatedConfig]):
    """W + tanh(g)·u vᵀ."""

    name = "gated"
    spec = GatedConfig
    ops = ("linear",)
    additive = True

    def params(self, spec: GatedConfig, site: WeightSite) -> dict[str, Param]:
        return {
            "gated_u": Param((site.out_features, 1), "normal"),
            "gated_v": Param((1, site.in_features), "normal"),
            "gated_g": Param((1,), "zeros", use="vector"),
        }

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + torch.tanh(p.gated_g) * F.linear(F.linear(x, p.gated_v), p.gated_u)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + torch.tanh(p.gated_g) * (p.gated_u @ p.gated_v)
