"""Which triplets stay: those of the largest sensitivity, smoothed, times its uncertainty (equations 8 to 11)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftc.rule import BySite

from .config import AdaLoraConfig


def weigh(spec: AdaLoraConfig, tensors: BySite, averages: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> None:
    """Take the sensitivity |w·∇w| of every number into its averages."""
    for site, own in tensors.items():
        for name, tensor in own.items():
            now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
            mean, spread = averages.get((site, name), (torch.zeros_like(now), torch.zeros_like(now)))
            mean = spec.beta1 * mean + (1 - spec.beta1) * now
            averages[site, name] = (mean, spec.beta2 * spread + (1 - spec.beta2) * (now - mean).abs())


def allot(spec: AdaLoraConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
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


def filed(spec: AdaLoraConfig, tensors: BySite, kept: Mapping[str, Tensor]) -> tuple[AdaLoraConfig, BySite]:
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
