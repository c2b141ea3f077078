"""LoRA: what to adapt, and with which rank."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from peftc.specs import LayerSelection, ParameterSelection, PatternedAlpha, PatternedRank
from peftc.specs.base import AdapterSpec, TrainedBiases
from peftc.specs.selection import first_match

from ..trainable_tokens import TokensBeside

INITS = ("gaussian", "olora", "pissa", "orthogonal")


def _init_name(value: Any) -> Any:
    """Lower case, as PEFT accepts names in any case; unknown names are refused with the known ones."""
    if not isinstance(value, str):
        return value
    name = value.lower()
    if name not in INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        hint = " (a trained adapter's file loads with true: its weights replace the start)" if name == "eva" else ""
        raise ValueError(f"unknown initialisation; valid are true, false, {', '.join(INITS)}, pissa_niter_<n>{hint}")
    return name


class LoraConfig(LayerSelection, ParameterSelection, PatternedRank, PatternedAlpha, TokensBeside):
    """Low-rank adaptation, y + s·B(A(x)). Hu et al. 2021, arXiv:2106.09685.

    `r` is the rank and s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023,
    arXiv:2312.03732). `rank_pattern` and `alpha_pattern` override both per module: the first key for which
    `re.match(rf"(.*\\.)?({key})$", fqn)` holds wins. `layers_to_transform` keeps the layers with these indices;
    `layers_pattern` names the list that holds them. `bias` trains base biases (`all`, or those of adapted modules).
    `init_lora_weights`: true (A kaiming-uniform, B zero), false (both random), `gaussian`, `orthogonal`, `olora`
    (arXiv:2406.01775), `pissa`, `pissa_niter_<n>` (arXiv:2404.02948).
    `use_dora` trains a magnitude for every output beside the direction (Liu et al. 2024, arXiv:2402.09353).
    `fan_in_fan_out` is informative: the layout is read off the module.
    `target_parameters` names parameters (`experts.gate_up_proj`) that no linear holds: matrices, or one for each expert in
    three dimensions. They, and the weights of an nn.MultiheadAttention in `target_modules`, are adapted as weights.
    `trainable_token_indices` are tokens whose embeddings are trained beside that: of the input embedding, or by the name of
    a module (`{"embed_tokens": [32000]}`); with `ensure_weight_tying` other tokens at another end of a tie are an error.

    Example: LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    """

    not_implemented: ClassVar[Mapping[str, Any]] = {
        "use_qalora": False,
        "layer_replication": None,
        "megatron_config": None,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
    }
    informative = AdapterSpec.informative | {
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "enable_lora",
    }

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: float | int = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: Annotated[bool | str, BeforeValidator(_init_name)] = True

    @property
    def trained_biases(self) -> TrainedBiases:
        return "adapted" if self.bias == "lora_only" else self.bias

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        from .experts import fused

        new, tensors = fused(self, model, tensors)
        return cast(Self, new), tensors

    def scaled(self, factor: float) -> Self:
        pattern = {key: alpha * factor for key, alpha in self.alpha_pattern.items()}
        return self.model_copy(update={"lora_alpha": self.lora_alpha * factor, "alpha_pattern": pattern})

    def alpha_for(self, fqn: str) -> float:
        """lora_alpha at module `fqn`, after `alpha_pattern`."""
        return first_match(self.alpha_pattern, fqn, self.lora_alpha)

    def scaling_for(self, fqn: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        rank = self.rank_for(fqn)
        return self.alpha_for(fqn) / (math.sqrt(rank) if self.use_rslora else rank)
