"""DoRA: m ⊙ (W + s·BA) / ‖W + s·BA‖ by rows.  Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.

The norm is a constant to the gradient (section 4.3), as in peft. Rows are outputs: those of a convolution have its kernel,
those of an embedding are its dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Shapes

from .base import Lora
from .config import LoraConfig
from .linear import LoraConv, LoraEmbedding, LoraLinear

_MAGNITUDE = "lora_magnitude_vector"


class _Dora(Lora):
    """What DoRA adds to LoRA on any op: the magnitude m, which begins as the norm that is there."""

    additive = False
    local = "o"
    scale = None
    no_sum = "adapters with use_dora=True have magnitudes, which no weighted sum is defined for"

    def serves(self, spec: LoraConfig) -> bool:
        return spec.variant == "dora"

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        kernel = len(site.kernel_size)
        shape = (1, site.out_features, *(1,) * kernel) if kernel else (site.out_features,)  # As in peft's files.
        axes = f".o{'.' * kernel}" if kernel else "o"
        magnitude = Param(shape, "rule", _MAGNITUDE, use="vector", axes=axes)
        return {**super().params(spec, site), "magnitude": magnitude}

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        drops = self.dropouts(spec, site).get("lora_dropout", 0.0) > 0
        return {**super().constants(spec, site), "drops": drops, "kernel": len(site.kernel_size)}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        if site.weight is None:
            return "use_dora=True needs the weight for its norm, which is not a plain parameter here"
        if spec.lora_bias:
            return "use_dora=True scales what the weight gives; lora_bias adds to the bias: leave it out"
        if site.groups > 1:
            return f"use_dora=True needs the weight that LoRA makes, which {site.groups} groups can't express"
        return super().check(spec, site)

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        if not shapes.keys() & {"lora_A", "lora_B"}:
            return {"magnitude": _norm(super().weight(weight, p)).view(shapes["magnitude"])}
        made = super().initialise(weight, shapes, p)
        if not p.residual and {"lora_A", "lora_B"} <= made.keys():  # Else the start is taken off again, or one is zero.
            weight = weight + p.scaling * made["lora_B"] @ made["lora_A"]
        return {**made, "magnitude": _norm(weight).view(shapes["magnitude"])}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        changed = super().weight(weight, p)
        gain = p.magnitude.flatten() / _norm(changed).detach()
        return changed * gain.view(-1, 1, *(1,) * p.kernel)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        """g·(base(x) + s·B(A(x))) without the bias, which is not scaled; with dropout, base sees what A sees."""
        weight = p.weight
        gain = p.magnitude.flatten() / _norm(super().weight(weight, p)).detach()
        if p.drops:
            dropped = p.lora_dropout(x)
            plain = p.op(dropped, weight.to(dropped.dtype))
            changed = plain + self.change(dropped, p)
            return y + (self.scaled(changed, gain, p) - plain)
        plain = y if p.bias is None else y - self.scaled(torch.ones_like(y), p.bias.to(y.dtype), p)
        return y + (self.scaled(plain + self.change(x, p), gain, p) - plain)

    def scaled(self, y: Tensor, gain: Tensor, p: Any) -> Tensor:
        """`y` with every output times its own number; channels come before the places of a kernel."""
        return y * gain.view(-1, *(1,) * p.kernel)


def _norm(weight: Tensor) -> Tensor:
    """The norm of every row, (out,)."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


class DoraLinear(_Dora, LoraLinear):
    """On linear sites."""


class DoraEmbedding(_Dora, LoraEmbedding):
    """On embeddings."""


class DoraConv(_Dora, LoraConv):
    """On convolutions."""
