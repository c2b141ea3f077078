"""What LoRA's rules have in common: constants, dropout, bias, and how adapters are combined."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite
from peftc.rule import Adapted, Combination, Constant, Part, Read, Rule, Shapes

from .combination import COMBINATIONS, combined_factors, combined_spec
from .config import LoraConfig
from .factors import init_names
from .starts import start_of
from .task_arithmetic import checked


class Lora(Rule[LoraConfig]):
    name = "lora"
    spec = LoraConfig
    additive = True
    local = "oi"
    keys = (
        "lora_A",
        "lora_B",
        "lora_A0",
        "lora_B0",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_diag",
    )
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "lora_alpha"}
    combinations = COMBINATIONS
    exact = "cat"
    # Why adapters of this form have no weighted sum, if they have none.
    no_sum: ClassVar[str] = ""
    # The two factors: (r, in, …) and (out, r, …).
    names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    scale = "scaling"
    drops = ("lora_dropout",)

    def serves(self, spec: LoraConfig) -> bool:
        return spec.variant != "dora"

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        fqn, init = site.name, spec.init_lora_weights
        return {
            "r": spec.rank_for(fqn),
            "lora_alpha": spec.alpha_for(fqn),
            "scaling": spec.scaling_for(fqn),
            "biased": spec.lora_bias,
            "residual": start_of(spec).taken_off,
            "groups": site.groups,
            **({"init": str(init)} if "rule" in init_names(spec, site) else {}),
        }

    def cannot_fold(self, spec: LoraConfig, site: WeightSite) -> str | None:
        return (
            "lora_bias=True needs a bias to fold into; the site has none" if spec.lora_bias and not site.bias else None
        )

    def change(self, x: Tensor, p: Any) -> Tensor:
        """s·B(A(x)), without B's bias."""
        raise NotImplementedError

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        delta = self.change(p.lora_dropout(x) if self.drops else x, p)
        return y + (delta + p.lora_B_bias * p.scaling if p.biased else delta)

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + p.scaling * p.lora_B_bias if p.biased else bias

    def read_shape(self, tensors: Shapes, weight: tuple[int, ...]) -> Read | None:
        if "lora_embedding_A" in tensors:
            return "embedding", "in_out", 1
        a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if a is None or b is None:
            return None
        if len(weight) > 2:
            return f"conv{len(weight) - 2}d", "out_in", a[1] // weight[1]
        # A square weight does not show which way it lies.
        layout = "in_out" if (b[0], a[1]) == weight[::-1] else "out_in"
        return "linear", layout if len(set(weight)) > 1 else None, 1

    def combination(self, how: Combination, specs: Sequence[LoraConfig]) -> Combination:
        return checked(how, [max([spec.r, *spec.rank_pattern.values()]) for spec in specs])

    def combined(self, specs: Mapping[str, LoraConfig], where: Adapted, how: Combination) -> LoraConfig:
        if self.no_sum:
            raise AdapterError(f"add_weighted_adapter: {self.no_sum}")
        return combined_spec(specs, where, how)

    def combine(self, site: WeightSite, parts: Sequence[Part], how: Combination) -> dict[str, Tensor]:
        a, b = self.names
        values = dict(zip(self.names, combined_factors(a, b, site, parts, how), strict=True))
        if parts[0].p.biased:
            biases = [part.weight * part.p.scaling * part.p.lora_B_bias for part in parts]
            values["lora_B_bias"] = torch.stack(biases).sum(0)
        return values
