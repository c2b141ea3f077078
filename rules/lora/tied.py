"""LoRA at the other ends of an embedding's tie, with the embedding's own factors (`ensure_weight_tying`)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Factors, Param

from .base import Lora
from .config import LoraConfig


class LoraTied(Product[LoraConfig], Lora):
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

    def factors(self, p: Any) -> Factors:
        return Factors(p.lora_embedding_A.T, p.lora_embedding_B.T, p.scaling)
