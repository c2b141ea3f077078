"""What LoRA's rules have in common: constants, dropout, bias, and how adapters are combined."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftc.graph.sites import Site
from peftc.rule import Combination, Constant, Part, Rule
from peftc.specs import LoraConfig

from .lora_combination import COMBINATIONS, combined_factors, combined_spec
from .lora_factors import init_names, starts_from_weight


class Lora(Rule[LoraConfig]):
    name = "lora"
    spec = LoraConfig
    additive = True
    combinations = COMBINATIONS
    # The two factors: (r, in, …) and (out, r, …).
    names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    def constants(self, spec: LoraConfig, site: Site) -> dict[str, Constant]:
        fqn, init = site.name, spec.init_lora_weights
        return {
            "r": spec.rank_for(fqn),
            "lora_alpha": spec.alpha_for(fqn),
            "scaling": spec.scaling_for(fqn),
            "biased": spec.lora_bias,
            "residual": starts_from_weight(spec),
            "groups": site.groups,
            **({"init": str(init)} if init_names(spec, site)[0] == "rule" else {}),
        }

    def dropouts(self, spec: LoraConfig, site: Site) -> dict[str, float]:
        return {"lora_dropout": spec.lora_dropout}

    def cannot_fold(self, spec: LoraConfig, site: Site) -> str | None:
        return (
            "lora_bias=True needs a bias to fold into; the site has none" if spec.lora_bias and not site.bias else None
        )

    def fold_bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + p.scaling * p.lora_B_bias if p.biased else bias

    def combined(
        self, specs: Mapping[str, LoraConfig], where: Mapping[str, Sequence[str]], how: Combination
    ) -> LoraConfig:
        return combined_spec(specs, where, how)

    def combine(self, site: Site, parts: Sequence[Part], how: Combination) -> dict[str, Tensor]:
        a, b = self.names
        values = dict(zip(self.names, combined_factors(a, b, site, parts, how), strict=True))
        if parts[0].p.biased:
            biases = [part.weight * part.p.scaling * part.p.lora_B_bias for part in parts]
            values["lora_B_bias"] = torch.stack(biases).sum(0)
        return values
