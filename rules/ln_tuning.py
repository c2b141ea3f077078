"""LN-tuning: the norms of a model are trained, and nothing else.  Zhao et al. 2023, arXiv:2312.11420, section 3."""

from typing import Any, Literal

from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Rule, Shapes
from peftc.specs import AdapterSpec


class LNTuningConfig(AdapterSpec):
    """Trained weights and biases in the place of the base's. Zhao et al. 2023, arXiv:2312.11420, section 3.

    Meant for norms; a linear, an embedding or a convolution that `target_modules` names is trained whole, too.

    Example: LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])
    """

    peft_type: Literal["LN_TUNING"] = "LN_TUNING"


class LNTuning(Rule[LNTuningConfig]):
    """The weight, and the bias where there is one, as the adapter's own: in the base's dtype, as they lie there."""

    name, spec, local = "ln_tuning", LNTuningConfig, "oi"
    ops = ("norm", "linear", "embedding", "conv1d", "conv2d", "conv3d")
    keys = ("ln_tuning_layers",)

    def params(self, spec: LNTuningConfig, site: WeightSite) -> dict[str, Param]:
        shape = (site.out_features, site.in_features // site.groups, *site.kernel_size)
        axes = "oi" + "." * len(site.kernel_size)
        if site.op == "norm":
            shape, axes = shape[:1], "o"
        elif site.layout == "in_out":
            shape, axes = shape[::-1], "io"
        weight = Param(shape, "rule", "ln_tuning_layers.weight", use="vector", axes=axes, dtype=site.dtype)
        bias = Param((site.out_features,), "rule", "ln_tuning_layers.bias", use="vector", axes="o", dtype=site.dtype)
        return {"ln_weight": weight, **({"ln_bias": bias} if site.bias is not None else {})}

    def constants(self, spec: LNTuningConfig, site: WeightSite) -> dict[str, Constant]:
        return {"turned": site.layout == "in_out"}

    def check(self, spec: LNTuningConfig, site: WeightSite) -> str | None:
        if site.weight is None:
            return "it has no weight that is a plain parameter, so there is nothing to train"
        if site.module.startswith(("BatchNorm", "SyncBatchNorm")):
            return "it keeps statistics, of which an adapter needs its own: name it in modules_to_save"
        return None

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        made = {"ln_weight": weight.mT if p.turned else weight}
        return made | ({"ln_bias": p.bias} if "ln_bias" in shapes else {})

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return p.ln_weight.mT if p.turned else p.ln_weight

    def bias(self, bias: Tensor, p: Any) -> Tensor:
        return p.ln_bias
