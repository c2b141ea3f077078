"""PVeRA: VeRA whose inner vector is drawn from a learned distribution.  Fillioux et al. 2025, arXiv:2512.07703."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant
from peftc.specs.selection import Share

from .vera import ProjectedConfig, VeraRule


class PveraConfig(ProjectedConfig):
    """Probabilistic VeRA. Fillioux et al. 2025, arXiv:2512.07703, section 3.

    The 2`r` rows of A and d give means and logarithms of variances; while training, the inner vector is drawn from them,
    else it is the mean (which merging takes, too), or also drawn (`sample_at_inference`). The other fields are VeRA's.

    Example: PveraConfig(r=256, target_modules=["q_proj", "v_proj"])
    """

    # Numbers come out of torch's own generator, as those of dropouts do.
    not_implemented: ClassVar[Mapping[str, Any]] = {"generator_seed": None}

    peft_type: Literal["PVERA"] = "PVERA"
    pvera_dropout: Share = 0.0
    bias: Literal["none", "all", "pvera_only"] = "none"
    sample_at_inference: bool = False


class Pvera(VeraRule[PveraConfig]):
    """On linear sites."""

    name, spec, prefix, halves = "pvera", PveraConfig, "pvera", 2
    keys = ("pvera_lambda_b", "pvera_lambda_d")

    def constants(self, spec: PveraConfig, site: WeightSite) -> dict[str, Constant]:
        return {**super().constants(spec, site), "always": spec.sample_at_inference}

    def dropouts(self, spec: PveraConfig, site: WeightSite) -> dict[str, float]:
        # The second one is not applied: it tells training from evaluation.
        return {"pvera_dropout": spec.pvera_dropout, "pvera_training": 0.5}

    def cautions(self, constants: Mapping[str, Constant], slots: Sequence[str]) -> list[str]:
        return ["draws in eval() too (sample_at_inference); merged it is the mean"] if constants["always"] else []

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        a, b = self.projections(p)
        return weight + (p.pvera_lambda_b[:, None] * b) @ (p.pvera_lambda_d[: p.r, None] * a[: p.r])

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        a, b = self.projections(p)
        mean, spread = (p.pvera_lambda_d * F.linear(p.pvera_dropout(x), a)).chunk(2, dim=-1)
        drawn = mean + torch.exp(0.5 * spread) * torch.randn_like(spread)
        if not p.always:
            drawn = torch.where(p.pvera_training(torch.ones_like(mean[..., :1])) == 1, mean, drawn)
        return y + p.pvera_lambda_b * F.linear(drawn, b)
