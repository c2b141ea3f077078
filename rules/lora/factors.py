"""LoRA's factors: their declarations and how they start."""

import torch
from torch import Tensor

from peftc.graph.sites import WeightSite
from peftc.rule import Param

from .config import LoraConfig


def factors(spec: LoraConfig, site: WeightSite, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Param]:
    """A and B of these shapes, and B's bias if the spec wants one."""
    init = init_names(spec, site)
    kernel = "." * len(site.kernel_size)
    params = {
        "lora_A": Param(a, init[0], "lora_A.weight", axes=f"ri{kernel}"),
        "lora_B": Param(b, init[1], "lora_B.weight", axes=f"or{kernel}"),
    }
    if spec.lora_bias:
        params["lora_B_bias"] = Param((site.out_features,), "zeros", "lora_B.bias", use="vector", axes="o")
    return params


def init_names(spec: LoraConfig, site: WeightSite) -> tuple[str, str]:
    """How A and B start, for linear and convolution sites (Hu et al. 2021, section 4.1; B = 0 makes the identity)."""
    match spec.init_lora_weights:
        case True:
            return "kaiming_uniform", "zeros"
        case False:
            return "kaiming_uniform", "kaiming_uniform"
        case "gaussian":
            return f"normal:{1 / spec.rank_for(site.name)}", "zeros"
        case _:
            return "rule", "rule"


def starts_from_weight(spec: LoraConfig) -> bool:
    """Whether the factors start as a part of the weight, which is then subtracted again."""
    name = spec.init_lora_weights
    return isinstance(name, str) and (name == "olora" or name.startswith("pissa"))


def from_weight(name: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) taken from `weight` (out, in), so that s·B·A is its leading part.

    olora: the QR factors (Büyükakyüz 2024, arXiv:2406.01775). pissa: the principal singular triplets (Meng et al. 2024,
    arXiv:2404.02948, equations 2–4), pissa_niter_<n> by randomised SVD.
    """
    if name == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if name == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(name.rpartition("_")[2]))
        vh = v.T
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root


def orthogonal(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with orthogonal row spaces, so that B·A = 0 though neither is zero."""
    r, in_features = a
    q, _ = torch.linalg.qr(torch.randn(r, r))
    return (torch.randn(in_features, r // 2) @ q[0::2]).T / 10, torch.randn(b[0], r // 2) @ q[1::2] / 10


def no_special_init(spec: LoraConfig, site: WeightSite) -> str | None:
    if isinstance(spec.init_lora_weights, str) and spec.init_lora_weights != "gaussian":
        return f"init_lora_weights={spec.init_lora_weights!r} is for linear sites, this is {site.op}"
    return None
