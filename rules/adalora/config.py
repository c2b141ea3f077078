"""AdaLoRA: which sites, and how the budget of ranks falls."""

import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peftc.specs.base import AdapterSpec
from peftc.specs.selection import Count, LayerSelection, Share

from ..lora.config import LoraConfig

# Fields of LoRA that would change the result, and do nothing here.
_LORAS = (
    *("use_rslora", "use_dora", "lora_bias", "alpha_pattern", "target_parameters", "use_qalora", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "kasa_config", "ensure_weight_tying"),
    "loftq_config",
)
Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class AdaLoraConfig(LayerSelection):
    """Adaptive budget allocation: triplets of A, E and B that matter little go. Zhang et al. 2023, arXiv:2303.10512.

    Every site begins with the rank `init_r`; in the end there are `target_r` triplets a site on average. For `tinit` steps
    all are kept, then their number falls as a cubic until `tfinal` steps before `total_step`, and is changed every
    `deltaT` steps (equation 12). `beta1`, `beta2`: the averages of sensitivity and its uncertainty (equations 9, 10).
    `orth_reg_weight`: the weight of the penalty that keeps A and B orthogonal (equation 4). s = lora_alpha / init_r.
    `rank_pattern` says which triplets a file has. `r` is not used. `fan_in_fan_out` is informative.

    Example: AdaLoraConfig(init_r=12, target_r=8, tinit=200, tfinal=500, total_step=3000, target_modules=["q_proj"])
    """

    # PEFT's class has all of LoRA's fields, with its defaults.
    not_implemented: ClassVar[Mapping[str, Any]] = {
        **LoraConfig.not_implemented,
        **{name: LoraConfig.model_fields[name].get_default(call_default_factory=True) for name in _LORAS},
    }
    informative = AdapterSpec.informative | {
        *("megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    }
    apart = frozenset({"rank_pattern"})

    peft_type: Literal["ADALORA"] = "ADALORA"
    total_step: Count
    r: int = 8
    lora_alpha: float | int = 8
    lora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool = True
    target_r: Count = 8
    init_r: Count = 12
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Count = 1  # noqa: N815 - PEFT's name
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    rank_pattern: dict[str, list[bool]] | None = None

    @model_validator(mode="after")
    def _check_adalora(self) -> Self:
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"total_step={self.total_step} leaves no step for the budget to fall between tinit={self.tinit} and"
                f" tfinal={self.tfinal}: raise it, or lower these"
            )
        if self.r != 8:
            warnings.warn(f"AdaLoraConfig.r={self.r} is not used: the rank at the start is init_r", stacklevel=2)
        return self

    def kept_at(self, fqn: str) -> list[bool] | None:
        """Which of the `init_r` triplets at module `fqn` the file has; None if it says nothing."""
        pattern = re.compile(rf"{re.escape(fqn)}\.lora_E(\.[^.]+)?")
        return next((kept for key, kept in (self.rank_pattern or {}).items() if pattern.fullmatch(key)), None)

    def respelled(self, names: Mapping[str, str]) -> Self:
        kept = {f"{new}.lora_E": found for old, new in names.items() if (found := self.kept_at(old)) is not None}
        update = {"layers_to_transform": None, "layers_pattern": None, "rank_pattern": kept or None}
        return super().respelled(names).model_copy(update=update)

    @property
    def goes_by_plain_names(self) -> bool:
        return super().goes_by_plain_names and not (self.rank_pattern or self.layers_pattern)

    def budget(self, step: int, first: int, last: int) -> int | None:
        """How many triplets stay after `step`, between the `first` number and the `last`; None if none are masked now."""
        end = self.total_step - self.tfinal
        if step <= self.tinit or (step < end and step % self.deltaT):
            return None
        left = max(0.0, 1 - (step - self.tinit) / (end - self.tinit))
        return int((first - last) * left**3 + last)
