"""How A and B start from the weight, or from nothing but their shapes."""

from typing import Any

import torch
from torch import Tensor

from peftc.rule import Shapes

Made = dict[str, Tensor]


def named(a: Tensor, b: Tensor) -> Made:
    return {"lora_A": a, "lora_B": b}


def olora(weight: Tensor, shapes: Shapes, p: Any) -> Made:
    """The QR factors.  Büyükakyüz 2024, arXiv:2406.01775."""
    q, upper = torch.linalg.qr(weight)
    return named(upper[: p.r].contiguous(), q[:, : p.r].contiguous())


def pissa(weight: Tensor, shapes: Shapes, p: Any) -> Made:
    """The principal singular triplets (Meng et al. 2024, arXiv:2404.02948, equations 2–4); pissa_niter_<n> by randomised
    SVD.
    """
    name, r = p.init, p.r
    if name == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(name.rpartition("_")[2]))
        vh = v.T
    root = torch.sqrt(s[:r] / p.scaling)
    return named(root[:, None] * vh[:r], u[:, :r] * root)


def mica(weight: Tensor, shapes: Shapes, p: Any) -> Made:
    """B has the least left singular vectors; A is zero.  arXiv:2604.01694."""
    return {"lora_B": torch.linalg.svd(weight, full_matrices=False)[0][:, -p.r :]}


def orthogonal(weight: Tensor, shapes: Shapes, p: Any) -> Made:
    """Orthogonal row spaces, so that B·A = 0 though neither is zero."""
    (r, in_features), (out_features, _) = shapes["lora_A"], shapes["lora_B"]
    q, _ = torch.linalg.qr(torch.randn(r, r))
    return named((torch.randn(in_features, r // 2) @ q[0::2]).T / 10, torch.randn(out_features, r // 2) @ q[1::2] / 10)
