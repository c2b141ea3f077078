"""What LoRA's starts and variants are told beside the spec's own fields, with PEFT's fields and defaults."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peftc.specs.base import Names
from peftc.specs.selection import Count

# The values of `init_lora_weights` that are names, beside `pissa_niter_<n>`.
INITS = ("gaussian", "olora", "pissa", "orthogonal", "eva", "corda", "lora_ga", "loftq", "mica")

# Forms of LoRA that exclude each other, and the field that asks for each.
VARIANTS = {
    "dora": "use_dora",
    "alora": "alora_invocation_tokens",
    "qalora": "use_qalora",
    "bdlora": "use_bdlora",
    "kasa": "kasa_config",
}


def init_name(value: Any) -> Any:
    """Lower case, as PEFT accepts names in any case; unknown names are refused with the known ones."""
    if not isinstance(value, str):
        return value
    name = value.lower()
    if name not in INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        raise ValueError(f"unknown initialisation; valid are true, false, {', '.join(INITS)}, pissa_niter_<n>")
    return name


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class EvaConfig(_Told):
    """Explained variance (Paischer et al. 2024, arXiv:2410.07170): A is the leading directions of the inputs.

    `rho` ≥ 1: a site may get up to rho·r of the ranks, which go to where they explain most. A direction has settled when
    its cosine with the one before the last batch is `tau`. Positions with the label `label_mask_value` don't count, with
    `use_label_mask`. `whiten` scales directions by their standard deviations; `adjust_scaling_factors` keeps alpha / r.
    """

    rho: Annotated[float, Field(ge=1, strict=False)] = 2.0
    tau: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


class CordaConfig(_Told):
    """Context-oriented decomposition (Yang et al. 2024, arXiv:2406.05223): the weight's parts as the data see them.

    `corda_method`: `ipm` adapts what matters most for the data, `kpm` what matters least. The covariance is summed in the
    inputs' dtype with `use_float16_for_covariance`. The files and `prune_temporary_fields` are for PEFT's preprocess_corda.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


class LoraGAConfig(_Told):
    """Gradient approximation (Wang et al. 2024, arXiv:2407.05000): A and B are singular vectors of the weight's gradient.

    `direction`: which of the 2·r leading ones A and B get; `scale`: how long they are, with `stable_gamma`.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Count = 16


class LoftQConfig(_Told):
    """Quantisation in turn with low rank (Li et al. 2023, arXiv:2310.08659): `loftq_iter` times, to `loftq_bits`."""

    loftq_bits: Literal[4, 8] = 4
    loftq_iter: Count = 1


class BdLoraConfig(_Told):
    """Blocks on the diagonal: `nblocks` of A where a module's name has one of `target_modules_bd_a` in it, of B likewise.

    Without `match_strict`, other modules have plain factors.
    """

    target_modules_bd_a: Names | None = None
    target_modules_bd_b: Names | None = None
    nblocks: Count = 1
    match_strict: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"target_modules_bd_a and target_modules_bd_b both have {sorted(both)}")
        return self


class KasaConfig(_Told):
    """Knowledge-aware singular values (Wang et al. 2024, arXiv:2412.06071): the weights of the penalty's two terms."""

    beta: Annotated[float, Field(ge=0, strict=False)] = 1e-4
    gamma: Annotated[float, Field(ge=0, strict=False)] = 1e-3


Range = Annotated[tuple[int, int], Field(strict=False)]


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def loftq(value: Any) -> Any:
    """What is empty, or None, is off, as in PEFT's files."""
    return LoftQConfig.model_validate(value) if value else {}
