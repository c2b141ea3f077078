"""LN-tuning: only the norms are trained.  Qi et al. 2022, arXiv:2211.08682, section 3."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from peftc import AdapterSpec, Param, Rule


class LnTuningConfig(AdapterSpec):
    """Which norms: `target_modules`."""

    peft_type: Literal["TEST_LN_TUNING"] = "TEST_LN_TUNING"


class LnTuning(Rule[LnTuningConfig]):
    """A weight, and a bias where there is one, that stand for the base's; both start as these are."""

    name, spec, ops = "test_ln_tuning", LnTuningConfig, ("norm",)

    def params(self, spec: LnTuningConfig, site: Any) -> dict[str, Param]:
        names = ["ln_weight"] + ["ln_bias"] * (site.bias is not None)
        return {name: Param((site.out_features,), "rule", use="vector") for name in names}

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        return {"ln_weight": weight, **({"ln_bias": p.bias} if "ln_bias" in shapes else {})}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return p.ln_weight

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return p.ln_bias
