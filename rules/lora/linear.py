"""LoRA on linear, embedding and convolution sites."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.product import Product
from peftc.rule import Factors, Param, Shapes

from .base import Lora
from .config import LoraConfig
from .factors import factors, no_special_init
from .pca import Directions
from .starts import made, start_of, unfit


class LoraLinear(Lora, Product[LoraConfig]):
    """y + s·B(A(drop(x))).  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    OLoRA, PiSSA, CorDA and LoRA-GA start from A0, B0 and train y + s·(B·A − B0·A0)x: the same function as theirs on the
    residual weight, but the weight stays as it is.
    """

    ops, states = ("linear",), (Directions,)
    # Which form of LoRA it is; those of other rules.
    variant: ClassVar[str | None] = None

    def serves(self, spec: LoraConfig) -> bool:
        return spec.variant == self.variant

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r = spec.rank_for(site.name)
        a, b = (r, site.in_features), (site.out_features, r)
        params = factors(spec, site, a, b)
        if not start_of(spec).taken_off:
            return params
        params["lora_A0"] = Param(a, "rule", trainable=False, axes="ri")
        return params | {"lora_B0": Param(b, "rule", trainable=False, axes="or")}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        return unfit(spec, site)

    def change(self, x: Tensor, p: Any) -> Tensor:
        delta = F.linear(F.linear(x, p.lora_A) * p.scaling, p.lora_B)
        return delta - F.linear(F.linear(x, p.lora_A0) * p.scaling, p.lora_B0) if p.residual else delta

    def factors(self, p: Any) -> Factors:
        if not p.residual:
            return Factors(p.lora_B, p.lora_A, p.scaling)
        return Factors(torch.cat([p.lora_B, p.lora_B0], 1), torch.cat([p.lora_A, -p.lora_A0]), p.scaling)

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        return made(weight, shapes, p)

    def calibration(self, spec: LoraConfig) -> Literal["inputs", "gradients"] | None:
        return start_of(spec).kind

    def counted(self, spec: LoraConfig, batch: Any) -> Tensor | None:
        return start_of(spec).counted(spec, batch)

    def calibrate(self, spec: LoraConfig, sites: Sequence[WeightSite], x: Tensor, state: Any) -> Any:
        return start_of(spec).calibrate(spec, sites, x, state)

    def settled(self, spec: LoraConfig, states: Mapping[str, Any]) -> Collection[str] | None:
        return start_of(spec).settled(spec, states)

    def calibrated(self, spec: LoraConfig, states: Mapping[str, Any]) -> tuple[LoraConfig, Mapping[str, Any]]:
        return start_of(spec).calibrated(spec, states)


class LoraEmbedding(Lora, Product[LoraConfig]):
    """y + s·B(A[token]): the same algebra with the one-hot token as input."""

    ops = ("embedding",)
    names = ("lora_embedding_A", "lora_embedding_B")
    drops = ()  # token ids can't be dropped; PEFT has none here either

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r, random = spec.rank_for(site.name), spec.init_lora_weights is False
        return {
            "lora_embedding_A": Param((r, site.in_features), "normal" if random else "zeros", use="lookup", axes="ri"),
            "lora_embedding_B": Param((site.out_features, r), "normal", axes="or"),
        }

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        if spec.lora_bias:
            return "lora_bias is for linear and convolution sites; an embedding has no bias"
        return no_special_init(spec, site)

    def change(self, x: Tensor, p: Any) -> Tensor:
        return F.linear(p.op(x, p.lora_embedding_A.T) * p.scaling, p.lora_embedding_B)

    def factors(self, p: Any) -> Factors:
        return Factors(p.lora_embedding_B, p.lora_embedding_A, p.scaling)


class LoraConv(Lora):
    """y + s·B(A(drop(x))): A has the site's kernel over all input channels, B is 1×1 in the site's groups."""

    ops = ("conv1d", "conv2d", "conv3d")

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r, ones = spec.rank_for(site.name), (1,) * len(site.kernel_size)
        a, b = (r, site.in_features, *site.kernel_size), (site.out_features, r // site.groups, *ones)
        return factors(spec, site, a, b)

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        r = spec.rank_for(site.name)
        if r % site.groups:
            return f"r={r} is not divisible by its {site.groups} groups"
        return no_special_init(spec, site)

    def cannot_fold(self, spec: LoraConfig, site: WeightSite) -> str | None:
        if site.groups > 1:
            return f"A mixes all channels, which a convolution in {site.groups} groups can't express"
        return super().cannot_fold(spec, site)

    def change(self, x: Tensor, p: Any, bias: Tensor | None = None) -> Tensor:
        return p.pointwise(p.op(x, p.lora_A, groups=1) * p.scaling, p.lora_B, bias, groups=p.groups)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + self.change(p.lora_dropout(x), p, p.lora_B_bias * p.scaling if p.biased else None)

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * torch.einsum("or,ri...->oi...", p.lora_B.flatten(1), p.lora_A)
