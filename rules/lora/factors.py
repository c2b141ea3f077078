"""LoRA's factors: their declarations and how they start."""

from peftc.graph.sites import WeightSite
from peftc.rule import Param

from .config import LoraConfig
from .starts import DRAWN, start_of


def factors(spec: LoraConfig, site: WeightSite, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Param]:
    """A and B of these shapes, and B's bias if the spec wants one."""
    init, kernel = init_names(spec, site), "." * len(site.kernel_size)
    params = {
        "lora_A": Param(a, init[0], "lora_A.weight", axes=f"ri{kernel}"),
        "lora_B": Param(b, init[1], "lora_B.weight", axes=f"or{kernel}", trainable=not start_of(spec).keeps_b),
    }
    if spec.lora_bias:
        params["lora_B_bias"] = Param((site.out_features,), "zeros", "lora_B.bias", use="vector", axes="o")
    return params


def init_names(spec: LoraConfig, site: WeightSite) -> tuple[str, str]:
    """How A and B start, for linear and convolution sites (Hu et al. 2021, section 4.1; B = 0 makes the identity)."""
    start = start_of(spec)
    if start is not DRAWN and site.op == "linear":
        return start.inits
    if spec.init_lora_weights is False:
        return "kaiming_uniform", "kaiming_uniform"
    if spec.init_lora_weights == "gaussian":
        return f"normal:{1 / spec.rank_for(site.name)}", "zeros"
    return "kaiming_uniform", "zeros"


def no_special_init(spec: LoraConfig, site: WeightSite) -> str | None:
    """The reason why a site that is not linear can't start as the spec says. With eva, others start as ever."""
    if spec.variant not in (None, "dora", "loftq"):
        return f"{spec.variant_field} is for linear sites, this is {site.op}"
    if isinstance(spec.init_lora_weights, str) and spec.init_lora_weights not in ("gaussian", "eva"):
        return f"init_lora_weights={spec.init_lora_weights!r} is for linear sites, this is {site.op}"
    return None
