"""Which subspaces learn on: those of the largest sensitivity, smoothed, times its uncertainty, over all sites."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftc.rule import BySite

from .config import AdamssConfig

_LEARNS = 2  # The column of `adamss_sizes` that says so.


def act(spec: AdamssConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
    """Keep what has stopped as it was, weigh the others, and at the steps for it stop those that are over the number."""
    for site, stopped in state.get("stopped", {}).items():
        for name, (where, value) in stopped.items():
            tensors[site][name][where] = value
    if not spec.init_warmup <= step <= spec.final_warmup:
        return
    averages = state.setdefault("averages", {})
    for site, own in tensors.items():
        averages[site] = {name: _weighed(spec, own[name], averages.get(site, {}).get(name)) for name in _FACTORS}
    if step % spec.mask_interval == 0:
        _stop(spec, tensors, step, state)
        state["averages"] = {}


_FACTORS = ("adamss_A", "adamss_B")


def _weighed(spec: AdamssConfig, tensor: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The averages of |w·∇w| and of how far it is from them, with this step's."""
    now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
    mean, spread = before or (torch.zeros_like(now), torch.zeros_like(now))
    spread = torch.lerp((now - mean).abs(), spread, spec.asa_uncertainty_beta)
    return torch.lerp(now, mean, spec.asa_importance_beta), spread


def _stop(spec: AdamssConfig, tensors: BySite, step: int, state: dict[str, Any]) -> None:
    total = sum(len(own["adamss_A"]) for own in tensors.values())
    left = 1 - (step - spec.init_warmup) / (spec.final_warmup - spec.init_warmup)
    wanted = int(spec.asa_target_subspaces + (total - spec.asa_target_subspaces) * left**spec.asa_schedule_exponent)
    learning = {site: own["adamss_sizes"][:, _LEARNS] == 1 for site, own in tensors.items()}
    scores = {site: _scores(tensors[site]["adamss_sizes"], state["averages"][site]).cpu() for site in tensors}
    everyone = torch.cat([scores[site][learns.cpu()] for site, learns in learning.items()])
    if wanted >= len(everyone):
        return
    # As in peft the last one of those that are wanted stops, too.
    limit = float(everyone.sort(descending=True).values[wanted - 1])
    stopped = state.setdefault("stopped", {})
    for site, own in tensors.items():
        sizes = own["adamss_sizes"]
        sizes[:, _LEARNS] = (learning[site] & (scores[site] > limit).to(sizes.device)).int()
        still = sizes[:, _LEARNS] == 0
        rows = still.repeat_interleave(sizes[:, 0].long())
        stopped[site] = {
            "adamss_A": (still, own["adamss_A"][still].clone()),
            "adamss_B": (rows, own["adamss_B"][rows].clone()),
        }


def _scores(sizes: Tensor, averages: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The importance of each subspace: on average over the numbers of its A, and over those of its B."""
    a, b = (mean * spread for mean, spread in (averages[name] for name in _FACTORS))
    rows, ranks = sizes[:, 0], sizes[:, 1]
    of_b = torch.stack([own.sum() for own in b.split(rows.tolist())])
    return a.sum((1, 2)) / (ranks * a.shape[2]) + of_b / (rows * ranks)
