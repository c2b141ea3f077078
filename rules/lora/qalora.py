"""QA-LoRA: A sees groups of inputs as one.  Xu et al. 2023, arXiv:2309.14717, section 3.3."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Factors, Param

from .config import LoraConfig
from .linear import LoraLinear


class QaloraLinear(LoraLinear):
    """y + s·B(A(pool(drop(x)))). As in peft, the means of the groups are multiplied by the number of groups."""

    local, variant = "o", "qalora"

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        found = super().params(spec, site)
        shape = (spec.rank_for(site.name), site.in_features // spec.qalora_group_size)
        return {**found, "lora_A": Param(shape, found["lora_A"].init, "lora_A.weight", axes="r.")}

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        return {**super().constants(spec, site), "group": spec.qalora_group_size, "inputs": site.in_features}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        size = spec.qalora_group_size
        return (
            None if site.in_features % size == 0 else f"qalora_group_size={size} does not divide its {site.in_features}"
        )

    def factors(self, p: Any) -> Factors:
        down = p.lora_A.repeat_interleave(p.group, 1) * (p.inputs // p.group / p.group)
        return Factors(p.lora_B, down, p.scaling)

    def change(self, x: Tensor, p: Any) -> Tensor:
        groups = p.inputs // p.group
        pooled = x.unflatten(-1, (groups, p.group)).mean(-1) * groups
        return F.linear(F.linear(pooled, p.lora_A) * p.scaling, p.lora_B)
