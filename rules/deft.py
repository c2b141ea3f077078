"""DEFT: W + Q(sR − VᵀW), a subspace of outputs is replaced.  Kumar et al. 2025, arXiv:2509.22793, section 3."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs.selection import LayerSelection, Rank, Share

from .rotation import wide


class DeftConfig(LayerSelection):
    """Decompositional efficient finetuning: what the weight gives in a subspace of outputs goes, and R comes in.

    `decomposition_method`: the subspace is that of P itself ("relu": Q = P, V = relu(P)), or of orthogonal columns ("qr":
    Q = V). s is `alpha` / r, or 1. With `para` nothing comes in (PaRa, which changes the model from the start). R starts
    with what is taken out, or at random with `init_scale` (`init_weights=False`), which changes the model.
    `deft_dropout` drops inputs of R. `bias` trains base biases (`all`, or those of adapted modules).

    Example: DeftConfig(r=8, target_modules=["q_proj", "v_proj"])
    """

    defaults_of = "LORA"

    peft_type: Literal["DEFT"] = "DEFT"
    r: Rank = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: Annotated[int, Field(ge=0)] | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: Share = 0.0
    init_weights: bool = True
    bias: Literal["none", "all", "deft_only"] = "none"


class Deft(Rule[DeftConfig]):
    """On linear sites."""

    name, spec, ops, local, identity = "deft", DeftConfig, ("linear",), "i", False  # A fresh one changes roundings.
    keys = ("deft_P", "deft_R")
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}

    def params(self, spec: DeftConfig, site: WeightSite) -> dict[str, Param]:
        r = min(spec.r, site.out_features)
        made = {"deft_P": Param((site.out_features, r), "normal:0.02", axes="or")}
        if not spec.para:
            init = "rule" if spec.init_weights else f"normal:{0.02 * spec.init_scale}"
            made["deft_R"] = Param((r, site.in_features), init, axes="ri")
        return made

    def constants(self, spec: DeftConfig, site: WeightSite) -> dict[str, Constant]:
        r = min(spec.r, site.out_features)
        given = {"r": r, "scaling": spec.alpha / r if spec.alpha else 1.0}
        return {**given, "removes": spec.para, "orthogonal": spec.decomposition_method == "qr"}

    def dropouts(self, spec: DeftConfig, site: WeightSite) -> dict[str, float]:
        return {} if spec.para else {"deft_dropout": spec.deft_dropout}

    def check(self, spec: DeftConfig, site: WeightSite) -> str | None:
        if site.weight is None and spec.init_weights and not spec.para:
            return "R starts with what the weight gives, which is not a plain parameter here"
        return None

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return {"deft_R": _subspace(p)[1].to(weight.dtype).mT @ weight / p.scaling}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        q, v = _subspace(p)
        taken = v.mT @ weight
        return weight - q @ (taken if p.removes else taken - p.scaling * p.deft_R)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        q, v = _subspace(p)
        taken = F.linear((y if p.bias is None else y - p.bias).to(v.dtype), v.mT)
        if p.removes:
            return y - F.linear(taken, q)
        return y - F.linear(taken - p.scaling * F.linear(p.deft_dropout(x).to(v.dtype), wide(p.deft_R)), q)


def _subspace(p: Any) -> tuple[Tensor, Tensor]:
    """Q and V (out, r)."""
    q = wide(p.deft_P)
    if p.orthogonal:
        q = torch.linalg.qr(q)[0]
        return q, q
    return q, torch.relu(q)
