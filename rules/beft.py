"""BEFT: b + Δb, a bias that is trained beside the base's own.  Huang et al. 2025, arXiv:2509.15974, section 3."""

from typing import Any, Literal

from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Param, Rule
from peftc.specs import AdapterSpec


class BeftConfig(AdapterSpec):
    """Bias-efficient finetuning, of the value projections by default. Huang et al. 2025, arXiv:2509.15974.

    A linear without a bias gets one, and can't be merged. `init_weights=False`: a random start, which changes the model.

    Example: BeftConfig(target_modules=["v_proj"])
    """

    excludes = False

    peft_type: Literal["BEFT"] = "BEFT"
    init_weights: bool = True


class Beft(Rule[BeftConfig]):
    """On linear sites."""

    name, spec, ops, local, additive = "beft", BeftConfig, ("linear",), "oi", True
    keys = ("beft_bias",)

    def params(self, spec: BeftConfig, site: WeightSite) -> dict[str, Param]:
        init = "zeros" if spec.init_weights else "normal"
        return {"beft_bias": Param((1, site.out_features), init, use="vector", axes=".o")}

    def cannot_fold(self, spec: BeftConfig, site: WeightSite) -> str | None:
        return "it has no bias that could be changed" if site.bias is None else None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + p.beft_bias.flatten()

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + p.beft_bias.flatten()
