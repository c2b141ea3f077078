"""AdaLoRA: W + s·B·diag(E)·A, with a penalty and a budget.  Zhang et al. 2023, arXiv:2303.10512, section 3.

Those triplets stay that have the largest sensitivity, smoothed, times its uncertainty (equations 8 to 11).
"""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.graph.sites import WeightSite
from peftc.rule import BySite, Constant, Param, Rule

from .config import AdaLoraConfig


class AdaLora(Rule[AdaLoraConfig]):
    """On linear sites and two-dimensional convolutions, whose kernel belongs to the columns."""

    name, spec, ops = "adalora", AdaLoraConfig, ("linear", "conv2d")
    local, additive, scale = "oi", True, "scaling"
    keys = ("lora_A", "lora_E", "lora_B")
    columns: ClassVar[Mapping[str, str]] = {"r": "r", "alpha": "lora_alpha"}
    drops = ("lora_dropout",)
    repeats = False

    def params(self, spec: AdaLoraConfig, site: WeightSite) -> dict[str, Param]:
        kept = spec.kept_at(site.fqn)
        r, columns = spec.init_r if kept is None else sum(kept), site.in_features * prod(site.kernel_size)
        std, e = ("normal:0.02", "zeros") if spec.init_lora_weights else ("normal", "normal")
        return {
            "lora_A": Param((r, columns), std, axes=None if site.kernel_size else "ri"),
            "lora_E": Param((r, 1), e, use="vector", axes="r."),
            "lora_B": Param((site.out_features, r), std, axes="or"),
        }

    def constants(self, spec: AdaLoraConfig, site: WeightSite) -> dict[str, Constant]:
        alpha = spec.lora_alpha if spec.lora_alpha > 0 else spec.init_r
        kernel = (site.out_features, site.in_features, *site.kernel_size) if site.kernel_size else ()
        scaling = alpha / (spec.init_r + 1e-5)  # As in peft, whatever the rank is by now.
        numbers = {"scaling": scaling, "orth_reg_weight": float(spec.orth_reg_weight)}
        return {"r": spec.init_r, "lora_alpha": float(alpha), "kernel_shape": kernel, **numbers}

    def check(self, spec: AdaLoraConfig, site: WeightSite) -> str | None:
        kept = spec.kept_at(site.fqn)
        if kept is not None and len(kept) != spec.init_r:
            return f"rank_pattern says {len(kept)} times whether it is kept there, and init_r={spec.init_r}"
        return f"its {site.groups} groups have weights that AdaLoRA's columns don't fit" if site.groups > 1 else None

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight + p.scaling * (p.lora_B @ (p.lora_E * p.lora_A)).reshape(weight.shape)

    def output(self, x: Tensor, y: Tensor, p: Any) -> Tensor:
        x = p.lora_dropout(x)
        if p.kernel_shape:
            return y + p.op(x, p.scaling * (p.lora_B @ (p.lora_E * p.lora_A)).reshape(p.kernel_shape))
        return y + F.linear(F.linear(x, p.lora_E * p.lora_A) * p.scaling, p.lora_B)

    def penalty(self, p: Any) -> Tensor:
        """The mean over all A and B of ‖AAᵀ − 1‖ and ‖BᵀB − 1‖: equation 4, but for the square, as in peft."""
        grams = (p.lora_A @ p.lora_A.mT, p.lora_B.mT @ p.lora_B)
        norms = [torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) for gram in grams]
        return p.orth_reg_weight * (norms[0] + norms[1]) / (2 * p.sites)

    def after_step(self, spec: AdaLoraConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
        end = spec.total_step - spec.tfinal
        if step < end:
            _weigh(spec, tensors, state.setdefault("averages", {}))
        if step <= end:
            _allot(spec, tensors, step, state)
        if step >= end:
            state.pop("averages", None)
            for site, kept in state.get("kept", {}).items():
                tensors[site]["lora_E"].masked_fill_(~kept, 0)

    def filed(self, spec: AdaLoraConfig, tensors: BySite, state: Mapping[str, Any]) -> tuple[AdaLoraConfig, BySite]:
        return _left(spec, tensors, state["kept"]) if "kept" in state else (spec, tensors)


def _weigh(spec: AdaLoraConfig, tensors: BySite, averages: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> None:
    """Take the sensitivity |w·∇w| of every number into its averages."""
    for site, own in tensors.items():
        for name, tensor in own.items():
            now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
            mean, spread = averages.get((site, name), (torch.zeros_like(now), torch.zeros_like(now)))
            mean = spec.beta1 * mean + (1 - spec.beta1) * now
            averages[site, name] = (mean, spec.beta2 * spread + (1 - spec.beta2) * (now - mean).abs())


def _allot(spec: AdaLoraConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
    """Mask the triplets that are over the budget of `step`, and note which are kept."""
    first = sum(len(own["lora_E"]) for own in tensors.values())
    budget = spec.budget(step, first, spec.target_r * len(tensors))
    if budget is None or "averages" not in state:
        return
    scores = {site: _scores(site, state["averages"]) for site in tensors}
    like = next(iter(scores.values()))
    everyone = torch.cat([score.flatten().to(like.device) for score in scores.values()])
    over = first - budget
    # Those that are as unimportant as the last one go with it.
    limit = float(torch.kthvalue(everyone, over)[0]) if over > 0 else -torch.inf
    state["kept"] = {site: score > limit for site, score in scores.items()}
    for site, kept in state["kept"].items():
        tensors[site]["lora_E"].masked_fill_(~kept, 0)


def _scores(site: str, averages: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> Tensor:
    """The importance of the triplets of a site, (r, 1): of E, and of the rows of A and columns of B on average."""
    a, e, b = (mean * spread for mean, spread in (averages[site, name] for name in ("lora_A", "lora_E", "lora_B")))
    return e + (a.mean(1, keepdim=True) + b.mean(0)[:, None])


def _left(spec: AdaLoraConfig, tensors: BySite, kept: Mapping[str, Tensor]) -> tuple[AdaLoraConfig, BySite]:
    """The triplets that are not zero, and which of the first ones they are.

    What has grown again since it was masked is no zero, and stays.
    """
    pattern, found = dict[str, list[bool]](), dict[str, Mapping[str, Tensor]]()
    for site, own in tensors.items():
        rows = (kept[site].to(own["lora_E"].device) | (own["lora_E"] != 0)).flatten()
        found[site] = {"lora_A": own["lora_A"][rows], "lora_E": own["lora_E"][rows], "lora_B": own["lora_B"][:, rows]}
        left = iter(rows.tolist())
        # The adapter may itself be from a file that has some of them only.
        before = spec.kept_at(site)
        pattern[f"{site}.lora_E"] = list(left) if before is None else [was and next(left) for was in before]
    return spec.model_copy(update={"rank_pattern": pattern}), found
