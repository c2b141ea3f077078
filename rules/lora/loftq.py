"""LoftQ: the weight as it is when quantised, and factors that make up for what that loses.

Li et al. 2023, arXiv:2310.08659, algorithm 1. NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E, in blocks of 64.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import Constant, Param, Shapes

from .config import LoraConfig
from .linear import LoraLinear
from .sub_configs import LoftQConfig

_BLOCK = 64
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class LoftqLinear(LoraLinear):
    """y + x·Dᵀ + s·B(A(drop(x))) with W + D the quantised weight: what PEFT puts in the weight's place.

    D follows from the weight, so files don't have it. Like peft, A and B are not divided by the scaling.
    """

    identity, additive, variant = False, False, "loftq"
    no_sum = (
        "adapters with init_lora_weights='loftq' stand on a quantised weight each, which no weighted sum of factors"
        " holds; merge_adapter() folds one of them"
    )

    def params(self, spec: LoraConfig, site: WeightSite) -> dict[str, Param]:
        r, out, inner = spec.rank_for(site.name), site.out_features, site.in_features
        return {
            "lora_A": Param((r, inner), "rule", "lora_A.weight", axes="ri"),
            "lora_B": Param((out, r), "rule", "lora_B.weight", axes="or"),
            "lora_D": Param((out, inner), "rule", trainable=False, dtype=site.dtype, axes="oi", kept=False),
        }

    def constants(self, spec: LoraConfig, site: WeightSite) -> dict[str, Constant]:
        told = spec.loftq_config
        assert isinstance(told, LoftQConfig), "the spec asks for one"
        return {**super().constants(spec, site), "bits": told.loftq_bits, "iterations": told.loftq_iter}

    def check(self, spec: LoraConfig, site: WeightSite) -> str | None:
        if not site.has_plain_weight:
            return (
                "loftq quantises a plain weight, which this is not. On a base that is quantised already, load it with"
                " init_lora_weights=True"
            )
        r, side = spec.rank_for(site.name), min(site.in_features, site.out_features)
        return f"loftq takes factors of the weight: r={r} is over its smaller side, {side}" if r > side else None

    def cautions(self, constants: Mapping[str, Constant], slots: Any) -> list[str]:
        return ["loftq: the weights act as quantised ones while the adapter is active, by tensors of their size"]

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return super().output(x, y, p) + F.linear(x, p.lora_D.to(x.dtype))

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return super().weight(weight, p) + p.lora_D

    def initialise(self, weight: Tensor, shapes: Shapes, p: Any) -> dict[str, Tensor]:
        left, a, b, near = weight, weight, weight, weight
        for _ in range(p.iterations):
            near = quantised(left, p.bits)
            u, s, vh = torch.linalg.svd(weight - near, full_matrices=False)
            root = s[: p.r].sqrt()
            a, b = root[:, None] * vh[: p.r], u[:, : p.r] * root
            left = weight - b @ a
        return {"lora_A": a, "lora_B": b, "lora_D": near - weight}


def quantised(weight: Tensor, bits: int) -> Tensor:
    """`weight` (out, in) as its quantisation gives it back: NF4 by blocks of 64, or 8 bits by rows, of float16."""
    if bits == 8:
        weight = weight.half().to(weight.dtype)
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return (weight * (127 / scale)).round() * (scale / 127)
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    values = torch.tensor(_NF4, dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize((blocks / scale).contiguous(), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).flatten()[: len(flat)].view(weight.shape)
