"""LoRA: what to adapt, and with which rank."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from peftc.specs.base import AdapterSpec, BiasMode, LayerIndices, Names, OneOrMoreNames, require_regex

T = TypeVar("T")
Rank = Annotated[int, Field(gt=0)]
# How the keys of rank_pattern and alpha_pattern, and layers_pattern, are set into regular expressions, as in PEFT.
_PATTERN = r"(.*\.)?({})$"
LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
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


class LoraConfig(AdapterSpec):
    """Low-rank adaptation, y + s·B(A(x)). Hu et al. 2021, arXiv:2106.09685.

    `r` is the rank and s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023,
    arXiv:2312.03732). `rank_pattern` and `alpha_pattern` override both per module: the first key for which
    `re.match(rf"(.*\\.)?({key})$", fqn)` holds wins. `layers_to_transform` keeps the layers with these indices;
    `layers_pattern` names the list that holds them. `bias` trains base biases (`all`, or those of adapted modules).
    `init_lora_weights`: true (A kaiming-uniform, B zero), false (both random), `gaussian`, `orthogonal`, `olora`
    (arXiv:2406.01775), `pissa`, `pissa_niter_<n>` (arXiv:2404.02948).
    `fan_in_fan_out` is informative: the layout is read off the module.
    `target_parameters` names parameters (`experts.gate_up_proj`) that no linear holds: matrices, or one for each expert in
    three dimensions. They, and the weights of an nn.MultiheadAttention in `target_modules`, are adapted as weights.
    """

    not_implemented: ClassVar[Mapping[str, Any]] = {
        "use_dora": False,
        "use_qalora": False,
        "layer_replication": None,
        "trainable_token_indices": None,
        "megatron_config": None,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
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
    r: Rank = 8
    lora_alpha: float | int = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: BiasMode = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: Annotated[bool | str, BeforeValidator(_init_name)] = True
    layers_to_transform: LayerIndices | None = None
    layers_pattern: OneOrMoreNames | None = None
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, float | int] = Field(default_factory=dict)
    target_parameters: Names | None = None

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} contradicts target_modules={self.target_modules!r}: it applies to a list of names;"
                        " give target_modules as a list, or put the layers into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                require_regex(field, key, _PATTERN)
        for pattern in self.layers_pattern or ():
            require_regex("layers_pattern", pattern, LAYERS_PATTERN)
        return self

    @property
    def trained_biases(self) -> BiasMode:
        return self.bias

    def rank_for(self, fqn: str) -> int:
        """The rank at module `fqn`, after `rank_pattern`."""
        return _first_match(self.rank_pattern, fqn, self.r)

    def alpha_for(self, fqn: str) -> float:
        """lora_alpha at module `fqn`, after `alpha_pattern`."""
        return _first_match(self.alpha_pattern, fqn, self.lora_alpha)

    def scaling_for(self, fqn: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        rank = self.rank_for(fqn)
        return self.alpha_for(fqn) / (math.sqrt(rank) if self.use_rslora else rank)


def pattern_matches(key: str, fqn: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` applies to module `fqn`."""
    return re.match(_PATTERN.format(key), fqn) is not None


def _first_match(patterns: Mapping[str, T], fqn: str, default: T) -> T:
    return next((value for key, value in patterns.items() if pattern_matches(key, fqn)), default)
