"""KaSA: the weight without its least singular triplets, and new ones.  Wang et al. 2024, arXiv:2412.06071, section 3."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Factors, Param, Shapes

from .config import LoraConfig
from .linear import LoraLinear
from .sub_configs import KasaConfig


class KasaLinear(LoraLinear):
    """y − B0·A0·x + s·B(d ⊙ A(drop(x))), B0·A0 the triplets. What peft takes off the base is taken off in the adapter."""

    identity, scale, variant = False, None, "kasa"
    no_sum = (
        "adapters with kasa_config take triplets off the weight each, which no weighted sum of factors holds;"
        " merge_adapter() folds one of them"
    )

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        found, r = super().params(spec, site), spec.rank_for(site.name)
        found["lora_diag"] = Param((r,), "normal", use="vector", axes="r")
        found["lora_A0"] = Param(found["lora_A"].shape, "rule", trainable=False, axes="ri")
        return found | {"lora_B0": Param(found["lora_B"].shape, "rule", trainable=False, axes="or")}

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        told = spec.kasa_config or KasaConfig()
        return {**super().constants(spec, site), "beta": float(told.beta), "gamma": float(told.gamma)}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        r, side = spec.rank_for(site.name), min(site.in_features, site.out_features)
        if not site.has_plain_weight:
            return "kasa_config takes singular values off the weight, which is not a plain parameter here"
        return (
            f"kasa_config would leave nothing of the weight: r={r}, its smaller side is {side}" if r >= side else None
        )

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return {"lora_A0": vh[-p.r :], "lora_B0": u[:, -p.r :] * s[-p.r :]}

    def factors(self, p: Any) -> Factors:
        up = torch.cat([p.lora_B * p.lora_diag, -p.lora_B0 / p.scaling], 1)
        return Factors(up, torch.cat([p.lora_A, p.lora_A0]), p.scaling)

    def change(self, x: Tensor, p: Any) -> Tensor:
        return F.linear(F.linear(x, p.lora_A) * p.lora_diag * p.scaling, p.lora_B)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return super().output(x, y - F.linear(F.linear(x, p.lora_A0), p.lora_B0), p)

    def penalty(self, p: Any) -> Tensor:
        """β·‖d‖² + γ·(‖BᵀB − 1‖ + ‖AAᵀ − 1‖): equations 9 to 11."""
        grams = (p.lora_B.mT @ p.lora_B, p.lora_A @ p.lora_A.mT)
        one = torch.eye(p.r, dtype=p.lora_A.dtype, device=p.lora_A.device)
        norms = [torch.linalg.norm(gram - one) for gram in grams]
        return p.beta * p.lora_diag.square().sum() + p.gamma * (norms[0] + norms[1])
