"""DeLoRA: W + (λ/r)·Σ bᵢaᵢᵀ / (‖bᵢ‖‖aᵢ‖), by the columns' norms.  Bini et al. 2025, arXiv:2503.18225, section 3."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Constant, Factors, Param, Shapes
from peftc.specs.selection import LayerSelection, PatternedRank, Share, first_match


class DeloraConfig(LayerSelection, PatternedRank):
    """Low-rank adaptation whose angles and strength are decoupled. Bini et al. 2025, arXiv:2503.18225.

    Each of the `r` terms has length one, and their sum the strength λ, which is trained from `delora_lambda` on
    (`rank_pattern` and `lambda_pattern`: others at some modules). `module_dropout` drops inputs of the change. `bias`
    trains base biases (`all`, or those of adapted modules). `init_weights=False`: a random start, which changes the model.

    Example: DeloraConfig(r=8, delora_lambda=15, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, patterns = "LORA", ("lambda_pattern",)

    peft_type: Literal["DELORA"] = "DELORA"
    delora_lambda: float | int = 15
    module_dropout: Share = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    lambda_pattern: dict[str, float | int] = Field(default_factory=dict)


class Delora(Product[DeloraConfig]):
    """On linear sites. The norms of the weight's columns are kept as they were in the beginning."""

    name, spec, ops = "delora", DeloraConfig, ("linear",)
    keys = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    columns: ClassVar[Mapping[str, str]] = {"r": "r"}
    drops = ("module_dropout",)
    takes = "norms"

    def params(self, spec: DeloraConfig, site: WeightSite) -> dict[str, Param]:
        r, zero = spec.rank_for(site.name), "zeros" if spec.init_weights else "kaiming_uniform"
        return {
            "delora_A": Param((r, site.in_features), "kaiming_uniform", axes="ri"),
            "delora_B": Param((site.out_features, r), zero, axes="or"),
            "delora_lambda": Param((1,), "rule", use="vector", axes="."),
            "delora_w_norm": Param((site.in_features,), "rule", trainable=False, use="vector", axes="i"),
        }

    def constants(self, spec: DeloraConfig, site: WeightSite) -> dict[str, Constant]:
        start = first_match(spec.lambda_pattern, site.name, spec.delora_lambda)
        return {"r": spec.rank_for(site.name), "start": float(start)}

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(weight, dim=0)
        return {"delora_lambda": weight.new_full((1,), p.start), "delora_w_norm": norms}

    def factors(self, p: Any) -> Factors:
        return Factors(p.delora_B * _lengths(p), p.delora_A * p.delora_w_norm, 1.0)


def _lengths(p: Any) -> Tensor:
    """By term, what makes its length λ/r."""
    a, b = torch.linalg.vector_norm(p.delora_A, dim=1), torch.linalg.vector_norm(p.delora_B, dim=0)
    return p.delora_lambda / p.r / (a.clamp(min=1e-4) * b.clamp(min=1e-4))
