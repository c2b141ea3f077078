"""Activated LoRA: LoRA from the last invocation in the text on, so that what a cache holds before is the base's.

Greenewald et al. 2025, arXiv:2504.12397, section 3.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant

from .config import LoraConfig
from .linear import LoraLinear


class AloraLinear(LoraLinear):
    """y + s·B(A(drop(x))) at the tokens of the last invocation, and those after it; y before, and in rows without one."""

    variant = "alora"

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        return {**super().constants(spec, site), "invocation": tuple(spec.alora_invocation_tokens or ())}

    def cannot_fold(self, spec: LoraConfig, site: WeightSite) -> str | None:
        return "it acts on the tokens from the invocation on only, and a weight on all"

    def begins(self, ids: Tensor, p: Any) -> Tensor:
        wanted = torch.tensor(p.invocation, device=ids.device)
        length = ids.shape[1]
        if length < len(wanted):
            return torch.full((len(ids),), length, device=ids.device)
        found = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
        return torch.where(found.any(1), last, length)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return torch.where(p.acts(x), super().output(x, y, p), y)

    def cautions(self, constants: Mapping[str, Constant], slots: Any) -> list[str]:
        return [f"acts from the tokens {list(cast('tuple[int, ...]', constants['invocation']))} on"]
