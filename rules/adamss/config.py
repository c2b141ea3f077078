"""AdaMSS: which sites, into how many subspaces, how their number falls, and how files name what these have."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from peftc.errors import CheckpointError
from peftc.specs.selection import Count, LayerSelection, Rank

Decay = Annotated[float | int, Field(ge=0, le=1)]
# Where files have the factors of one subspace.
_FACTOR = re.compile(r"(.*adamss_)([AB])\.(\d+)")


class AdamssConfig(LayerSelection):
    """Adaptive multi-subspaces: a change for each cluster of a weight's rows. Zheng et al. 2025 (NeurIPS).

    The rows of the first `r` left singular vectors (of the weight, and its bias as one more column) are clustered into
    `num_subspaces`, each with factors of rank `subspace_rank`; with `use_dynamic_rank` of no more than it has squared
    singular values over the share `svd_threshold` of its largest. `use_asa`: the least important subspaces stop learning.
    From step `init_warmup` to `final_warmup`, every `mask_interval` steps, their number falls to `asa_target_subspaces` of
    all sites, with `asa_schedule_exponent`, by averages of sensitivity and its uncertainty (`asa_importance_beta`,
    `asa_uncertainty_beta`). `random_seed` is the decomposition's. `init_weights=None`: a random start, which changes the
    model. Starting needs scikit-learn: `peftc[adamss]`.

    Example: AdamssConfig(r=100, num_subspaces=5, target_modules=["q_proj", "v_proj"])
    """

    defaults_of, excludes = "LORA", False

    peft_type: Literal["ADAMSS"] = "ADAMSS"
    r: Rank = 100
    num_subspaces: Count = 5
    subspace_rank: Count = 1
    init_weights: Literal["orthogonal"] | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: Decay = 0.85
    asa_uncertainty_beta: Decay = 0.85
    asa_schedule_exponent: float | int = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: Annotated[float | int, Field(ge=0, lt=1)] = 0.1
    random_seed: int = 0

    @field_validator("init_weights", mode="before")
    @classmethod
    def _as_none(cls, value: object) -> object:
        return None if value is False else value

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if not self.use_asa:
            return self
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"final_warmup={self.final_warmup} is no later than init_warmup={self.init_warmup}, so no subspace would"
                " stop: raise it, or lower init_warmup"
            )
        for name in ("asa_target_subspaces", "mask_interval", "asa_schedule_exponent"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: with use_asa it has to be above 0")
        return self

    def on_model(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        found: dict[str, dict[int, dict[str, Tensor]]] = {}
        for match in filter(None, map(_FACTOR.fullmatch, tensors)):
            found.setdefault(match[1], {}).setdefault(int(match[3]), {})[match[2]] = tensors[match[0]]
        if not found:
            return self, tensors
        packed = {key: value for key, value in tensors.items() if not _FACTOR.fullmatch(key)}
        for prefix, own in found.items():
            subspaces = [own[number] for number in sorted(own)]
            if any(one.keys() != {"A", "B"} or len(one["A"]) != one["B"].shape[-1] for one in subspaces):
                raise CheckpointError(f"{prefix}A, {prefix}B: not every subspace has an A of the rank of its B")
            rank = max(self.subspace_rank, *(len(one["A"]) for one in subspaces))
            packed[f"{prefix}A"] = torch.stack([_padded(one["A"].mT, rank).mT for one in subspaces])
            packed[f"{prefix}B"] = torch.cat([_padded(one["B"], rank) for one in subspaces])
            packed[f"{prefix}sizes"] = torch.tensor([[len(one["B"]), len(one["A"]), 1] for one in subspaces]).int()
        return self, packed


def _padded(factor: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(factor, (0, rank - factor.shape[-1]))
