"""DoRA: m ⊙ (W + s·BA) / ‖W + s·BA‖ by rows.  Liu et al. 2024, arXiv:2402.09353, equation 5."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from peftc import AdapterSpec, Param, Rule


class DoraConfig(AdapterSpec):
    peft_type: Literal["TEST_DORA"] = "TEST_DORA"
    r: int = 4


class Dora(Rule[DoraConfig]):
    """In both forms. A fresh one is the identity but for rounding."""

    name, spec, ops, local, identity = "test_dora", DoraConfig, ("linear",), "o", False

    def params(self, spec: DoraConfig, site: Any) -> dict[str, Param]:
        return {
            "dora_A": Param((spec.r, site.in_features), "kaiming_uniform", "dora_A.weight", axes="ri"),
            "dora_B": Param((site.out_features, spec.r), "zeros", "dora_B.weight", axes="or"),
            "dora_m": Param((site.out_features, 1), "rule", use="vector", axes="o."),
        }

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        return {"dora_m": weight.norm(dim=1, keepdim=True)}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        direction = weight + p.dora_B @ p.dora_A
        return p.dora_m * direction / direction.norm(dim=1, keepdim=True)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        gain = (p.dora_m / (p.weight + p.dora_B @ p.dora_A).norm(dim=1, keepdim=True)).flatten()
        y = y + F.linear(F.linear(x, p.dora_A), p.dora_B)
        return gain * y if p.bias is None else gain * (y - p.bias) + p.bias
