"""LoRA at the other ends of an embedding's tie, with the embedding's own factors (`ensure_weight_tying`)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Factors, Param

from .base import Lora
from .config import LoraConfig


class LoraTied(Lora):
    """y + s·Aᵀ(Bᵀ(drop(x))): what B·A adds to the embedding, it adds to a linear of the same weight."""

    ops, ends_only = ("linear",), True
    names = ("lora_embedding_A", "lora_embedding_B")
    again: ClassVar[Mapping[str, str]] = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}

    def serves(self, spec: LoraConfig) -> bool:
        return spec.variant is None

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r = spec.rank_for(site.name)
        return {
            "lora_embedding_A": Param((r, site.out_features), axes="ro"),
            "lora_embedding_B": Param((site.in_features, r), "normal", axes="ir"),
        }

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        return "ensure_weight_tying is for plain LoRA; leave it out" if spec.lora_bias else None

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(F.linear(p.lora_dropout(x), p.lora_embedding_B.T) * p.scaling, p.lora_embedding_A.T)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * (p.lora_embedding_B @ p.lora_embedding_A).T

    def factors(self, p: Any) -> Factors | None:
        return Factors(p.lora_embedding_A.T, p.lora_embedding_B.T, p.scaling)
