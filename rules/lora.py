"""LoRA on linear, embedding and convolution sites."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import Site
from peftc.rule import Constant, Param, Rule
from peftc.specs import LoraConfig

from .lora_init import from_weight, init_names, orthogonal, starts_from_weight


class _Lora(Rule[LoraConfig]):
    name = "lora"
    spec = LoraConfig
    additive = True

    def constants(self, spec: LoraConfig, site: Site) -> dict[str, Constant]:
        fqn = site.fqn
        values: dict[str, Constant] = {"r": spec.rank_for(fqn), "lora_alpha": spec.alpha_for(fqn)}
        if init_names(spec, site)[0] == "rule":
            values["init"] = str(spec.init_lora_weights)
        return {**values, "scaling": spec.scaling_for(fqn)}


class LoraLinear(_Lora):
    """y + s·B(A(drop(x))).  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    OLoRA and PiSSA start from the weight's own factors A0, B0 and train y + s·(B·A − B0·A0)x: the same function as
    theirs on the residual weight, but the weight stays as it is.
    """

    kinds = ("linear",)

    def params(self, spec: LoraConfig, site: Site) -> dict[str, Param]:
        r, init = spec.rank_for(site.fqn), init_names(spec, site)
        a, b = (r, site.in_features), (site.out_features, r)
        params = {"lora_A": Param(a, init[0], "lora_A.weight"), "lora_B": Param(b, init[1], "lora_B.weight")}
        if spec.lora_bias:
            params["lora_B_bias"] = Param((site.out_features,), "zeros", "lora_B.bias", use="vector")
        if starts_from_weight(spec):
            params["lora_A0"] = Param(a, "rule", trainable=False)
            params["lora_B0"] = Param(b, "rule", trainable=False)
        return params

    def constants(self, spec: LoraConfig, site: Site) -> dict[str, Constant]:
        return {"biased": spec.lora_bias, "residual": starts_from_weight(spec), **super().constants(spec, site)}

    def dropouts(self, spec: LoraConfig, site: Site) -> dict[str, float]:
        return {"lora_dropout": spec.lora_dropout}

    def check(self, spec: LoraConfig, site: Site) -> str | None:
        r = spec.rank_for(site.fqn)
        if spec.init_lora_weights == "orthogonal" and r % 2:
            return f"orthogonal initialisation needs an even rank, got r={r}"
        limit = min(site.in_features, site.out_features)
        if starts_from_weight(spec) and r > limit:
            return f"{spec.init_lora_weights} takes factors of the weight: r={r} is over its smaller side, {limit}"
        if starts_from_weight(spec) and site.weight is None:
            return f"{spec.init_lora_weights} takes factors of the weight, which is not a plain parameter here"
        return None

    def cannot_fold(self, spec: LoraConfig, site: Site) -> str | None:
        return (
            "lora_bias=True needs a bias to fold into; the site has none" if spec.lora_bias and not site.bias else None
        )

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        dropped = p.lora_dropout(x)
        delta = F.linear(F.linear(dropped, p.lora_A) * p.scaling, p.lora_B)
        if p.residual:
            delta = delta - F.linear(F.linear(dropped, p.lora_A0) * p.scaling, p.lora_B0)
        return y + (delta + p.lora_B_bias * p.scaling if p.biased else delta)

    def fold(self, weight: Tensor, p: Any) -> Tensor:
        delta = p.lora_B @ p.lora_A
        if p.residual:
            delta = delta - p.lora_B0 @ p.lora_A0
        return weight + p.scaling * delta

    def fold_bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + p.scaling * p.lora_B_bias if p.biased else bias

    def initialise(self, weight: Tensor, shapes: Mapping[str, tuple[int, ...]], p: Any) -> dict[str, Tensor]:
        if p.init == "orthogonal":
            a, b = orthogonal(shapes["lora_A"], shapes["lora_B"])
            return {"lora_A": a, "lora_B": b}
        a, b = from_weight(p.init, weight, p.r, p.scaling)
        return {"lora_A": a, "lora_B": b, "lora_A0": a.clone(), "lora_B0": b.clone()}


class LoraEmbedding(_Lora):
    """y + s·B(A[token]): the same algebra with the one-hot token as input."""

    kinds = ("embedding",)

    def params(self, spec: LoraConfig, site: Site) -> dict[str, Param]:
        r, random = spec.rank_for(site.fqn), spec.init_lora_weights is False
        return {
            "lora_embedding_A": Param((r, site.in_features), "normal" if random else "zeros", use="lookup"),
            "lora_embedding_B": Param((site.out_features, r), "normal"),
        }

    def check(self, spec: LoraConfig, site: Site) -> str | None:
        if spec.lora_bias:
            return "lora_bias is for linear and convolution sites; an embedding has no bias"
        return _no_special_init(spec, site)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        return y + F.linear(p.op(x, p.lora_embedding_A.T) * p.scaling, p.lora_embedding_B)

    def fold(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * (p.lora_embedding_B @ p.lora_embedding_A)


class LoraConv(_Lora):
    """y + s·B(A(drop(x))): A has the site's kernel over all input channels, B is 1×1 in the site's groups."""

    kinds = ("conv1d", "conv2d", "conv3d")

    def params(self, spec: LoraConfig, site: Site) -> dict[str, Param]:
        r, init = spec.rank_for(site.fqn), init_names(spec, site)
        ones = (1,) * len(site.kernel_size)
        params = {
            "lora_A": Param((r, site.in_features, *site.kernel_size), init[0], "lora_A.weight"),
            "lora_B": Param((site.out_features, r // site.groups, *ones), init[1], "lora_B.weight"),
        }
        if spec.lora_bias:
            params["lora_B_bias"] = Param((site.out_features,), "zeros", "lora_B.bias", use="vector")
        return params

    def constants(self, spec: LoraConfig, site: Site) -> dict[str, Constant]:
        return {"biased": spec.lora_bias, "groups": site.groups, **super().constants(spec, site)}

    def dropouts(self, spec: LoraConfig, site: Site) -> dict[str, float]:
        return {"lora_dropout": spec.lora_dropout}

    def check(self, spec: LoraConfig, site: Site) -> str | None:
        r = spec.rank_for(site.fqn)
        if r % site.groups:
            return f"r={r} is not divisible by its {site.groups} groups"
        return _no_special_init(spec, site)

    def cannot_fold(self, spec: LoraConfig, site: Site) -> str | None:
        if site.groups > 1:
            return f"A mixes all channels, which a convolution in {site.groups} groups can't express"
        return (
            "lora_bias=True needs a bias to fold into; the site has none" if spec.lora_bias and not site.bias else None
        )

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        inner = p.op(p.lora_dropout(x), p.lora_A, groups=1) * p.scaling
        bias = p.lora_B_bias * p.scaling if p.biased else None
        return y + p.pointwise(inner, p.lora_B, bias, groups=p.groups)

    def fold(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * torch.einsum("or,ri...->oi...", p.lora_B.flatten(1), p.lora_A)

    def fold_bias(self, bias: Tensor, p: Any) -> Tensor:
        return bias + p.scaling * p.lora_B_bias if p.biased else bias


def _no_special_init(spec: LoraConfig, site: Site) -> str | None:
    if isinstance(spec.init_lora_weights, str) and spec.init_lora_weights != "gaussian":
        return f"init_lora_weights={spec.init_lora_weights!r} is for linear sites, this is {site.kind}"
    return None


RULES = (LoraLinear(), LoraEmbedding(), LoraConv())
