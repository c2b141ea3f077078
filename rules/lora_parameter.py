"""LoRA on parameters: expert weights, and those of nn.MultiheadAttention."""

from typing import Any

import torch
from torch import Tensor

from peftc.graph.sites import Site
from peftc.rule import Param, Slot
from peftc.specs import LoraConfig

from .lora_base import Lora
from .lora_factors import init_names, no_special_init


class LoraParameter(Lora):
    """W + s·B·A, for every expert its own: `lora_A` holds their A one below the other, `lora_B` interleaves their B."""

    kinds = ("parameter",)

    def slot(self, spec: LoraConfig, site: Site) -> Slot:
        return "weight"

    def params(self, spec: LoraConfig, site: Site) -> dict[str, Param]:
        r, init = spec.rank_for(site.name) * site.groups, init_names(spec, site)
        return {
            "lora_A": Param((r, site.in_features), init[0], "lora_A.weight", axes="ri"),
            "lora_B": Param((site.out_features, r), init[1], "lora_B.weight", axes="or"),
        }

    def dropouts(self, spec: LoraConfig, site: Site) -> dict[str, float]:
        return {}

    def check(self, spec: LoraConfig, site: Site) -> str | None:
        if spec.lora_dropout and not spec.inference_mode:
            return f"lora_dropout={spec.lora_dropout} drops inputs, and a weight has none: set it to 0"
        if spec.lora_bias:
            return "lora_bias is for linear and convolution sites; a parameter has no bias"
        return no_special_init(spec, site)

    def fold(self, weight: Tensor, p: Any) -> Tensor:
        if p.groups == 1:
            return weight + p.scaling * (p.lora_B @ p.lora_A)
        a, b = p.lora_A.unflatten(0, (p.groups, -1)), p.lora_B.unflatten(1, (-1, p.groups))
        return weight + p.scaling * torch.einsum("ore,eri->eoi", b, a)
