"""LoRA on parameters: expert weights, and those of nn.MultiheadAttention."""

from typing import Any

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Constant, Factors, Param

from .base import Lora
from .config import LoraConfig
from .factors import init_names, no_special_init


class LoraParameter(Product[LoraConfig], Lora):
    """W + s·B·A, for every expert its own: `lora_A` holds their A one below the other, `lora_B` interleaves their B."""

    ops = ("parameter",)
    drops = ()

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r, init = spec.rank_for(site.name) * (site.experts or 1), init_names(spec, site)
        # peft (0.21) adds the delta of nn.MultiheadAttention's out_proj twice in every forward, so its files hold half.
        stored = 0.5 if site.known_as is not None and site.fqn.endswith("out_proj.weight") else 1.0
        return {
            "lora_A": Param((r, site.in_features), init[0], "lora_A.weight", axes="ri"),
            "lora_B": Param((site.out_features, r), init[1], "lora_B.weight", axes="or", stored=stored),
        }

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        return {**super().constants(spec, site), "experts": site.experts or 0}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        if spec.lora_dropout and not spec.inference_mode:
            return f"lora_dropout={spec.lora_dropout} drops inputs, and a weight has none: set it to 0"
        if spec.lora_bias:
            return "lora_bias is for linear and convolution sites; a parameter has no bias"
        return no_special_init(spec, site)

    def factors(self, p: Any) -> Factors:
        if not p.experts:
            return Factors(p.lora_B, p.lora_A, p.scaling)
        up = p.lora_B.unflatten(1, (-1, p.experts)).permute(2, 0, 1)
        return Factors(up, p.lora_A.unflatten(0, (p.experts, -1)), p.scaling)
