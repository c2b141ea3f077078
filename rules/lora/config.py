"""LoRA: what to adapt, and with which rank."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from peftc.specs import LayerSelection, ParameterSelection, PatternedAlpha, PatternedRank
from peftc.specs.base import AdapterSpec
from peftc.specs.selection import Count, Share, first_match

from ..trainable_tokens.config import TokensBeside
from .replication import replicated
from .sub_configs import (
    VARIANTS,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    Range,
    as_tuple,
    init_name,
    loftq,
)


class LoraConfig(LayerSelection, ParameterSelection, PatternedRank, PatternedAlpha, TokensBeside):
    """Low-rank adaptation, y + s·B(A(x)). Hu et al. 2021, arXiv:2106.09685.

    `r` is the rank and s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023,
    arXiv:2312.03732). `rank_pattern` and `alpha_pattern` override both per module: the first key for which
    `re.match(rf"(.*\\.)?({key})$", fqn)` holds wins. `layers_to_transform` keeps the layers with these indices;
    `layers_pattern` names the list that holds them. `bias` trains base biases (`all`, or those of adapted modules).
    `init_lora_weights`: true (A kaiming-uniform, B zero), false (both random), `gaussian`, `orthogonal`; from the weight,
    `olora` (arXiv:2406.01775), `pissa`, `pissa_niter_<n>` (arXiv:2404.02948), `mica` (its least directions, which B keeps;
    arXiv:2604.01694); from its quantisation, `loftq` (arXiv:2310.08659, `loftq_config`); and from data, which
    `compile(…, calibration=batches)` shows: `eva` (arXiv:2410.07170, `eva_config`), `corda` (arXiv:2406.05223,
    `corda_config`), `lora_ga` (arXiv:2407.05000, `lora_ga_config`).
    `use_dora` trains a magnitude for every output beside the direction (Liu et al. 2024, arXiv:2402.09353).
    `layer_replication`, [[0, 4], [2, 5]], makes a deeper model of the layers 0 to 3 and 2 to 4, which share the weights and
    have adapters of their own.
    `alora_invocation_tokens`: the adapter acts from the last occurrence of these token ids in a row on, and nowhere in rows
    without one (Greenewald et al. 2025, arXiv:2504.12397); it can't be merged.
    `use_qalora` pools `qalora_group_size` inputs for A (Xu et al. 2023, arXiv:2309.14717); `use_bdlora` has blocks on the
    diagonal of A or B (arXiv:2510.23346); `kasa_config` takes the least singular values off the weight and trains new ones
    (arXiv:2412.06071).
    `fan_in_fan_out` is informative: the layout is read off the module.
    `target_parameters` names parameters (`experts.gate_up_proj`) that no linear holds: matrices, or one for each expert in
    three dimensions. They, and the weights of an nn.MultiheadAttention in `target_modules`, are adapted as weights.
    `trainable_token_indices` are tokens whose embeddings are trained beside that: of the input embedding, or by the name of
    a module (`{"embed_tokens": [32000]}`). `ensure_weight_tying`: if the input embedding, or what is tied to it, is adapted
    or saved whole, all ends of the tie are, with the very same tensors; and other tokens at another end are an error.

    Example: LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    """

    closest: ClassVar[Mapping[str, str]] = {
        "velora_config": "gradient_checkpointing_enable() saves memory of activations, too",
        "monteclora_config": "lora_dropout for regularisation, or several adapters of several seeds",
        "arrow_config": "an adapter for each row (adapter_names=), or add_weighted_adapter",
        "megatron_config": "tensor parallelism of transformers (tp_plan)",
    }
    not_implemented: ClassVar[Mapping[str, Any]] = dict.fromkeys(closest)
    informative = AdapterSpec.informative | {
        "megatron_core",
        "runtime_config",
        "enable_lora",
    }

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: float | int = 8
    lora_dropout: Share = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: Annotated[bool | str, BeforeValidator(init_name)] = True
    loftq_config: Annotated[LoftQConfig | dict[Any, Any], BeforeValidator(loftq)] = Field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_qalora: bool = False
    qalora_group_size: Count = 16
    use_bdlora: BdLoraConfig | None = None
    kasa_config: KasaConfig | None = None
    alora_invocation_tokens: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = None
    layer_replication: Annotated[tuple[Range, ...], BeforeValidator(as_tuple)] | None = None

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.init_lora_weights == "loftq" and not isinstance(self.loftq_config, LoftQConfig):
            raise ValueError("init_lora_weights='loftq' needs loftq_config: give it, as {\"loftq_bits\": 4}")
        chosen = self._variants
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen.values())} don't go together: leave one of them out")
        if chosen.keys() & {"qalora", "bdlora", "kasa"} and not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"{next(iter(chosen.values()))} needs init_lora_weights=True or False")
        if self.layer_replication and self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} trains the base's biases, which replicated layers share: leave one out"
            )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError("lora_bias needs init_lora_weights=True or False")
        return self

    @property
    def _variants(self) -> dict[str, str]:
        found = {name: field for name, field in VARIANTS.items() if getattr(self, field)}
        return found | ({"loftq": "init_lora_weights='loftq'"} if self.init_lora_weights == "loftq" else {})

    @property
    def variant(self) -> str | None:
        """Which form of LoRA it is, if not the plain one; only one can be."""
        return next(iter(self._variants), None)

    @property
    def variant_field(self) -> str:
        """The field that says so."""
        return next(iter(self._variants.values()), "")

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        from .experts import fused

        new, tensors = fused(self, model, tensors)
        return cast(Self, new), tensors

    def reshaped(self, model: nn.Module) -> nn.Module:
        return replicated(model, self.layer_replication) if self.layer_replication else model

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
