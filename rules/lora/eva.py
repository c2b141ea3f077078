"""EVA: A begins with the directions of the inputs that explain most of their variance; ranks go where they explain most.

Paischer et al. 2024, arXiv:2410.07170, section 3.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite
from peftc.specs.selection import exact_patterns

from .config import LoraConfig
from .pca import Directions, turned
from .sub_configs import EvaConfig


def told(spec: LoraConfig) -> EvaConfig:
    """What the spec says, or PEFT's defaults."""
    return spec.eva_config or EvaConfig()


def counted(spec: LoraConfig, batch: Any) -> Tensor | None:
    """The positions that are neither padding nor without a label, if the batch says."""
    given = batch if isinstance(batch, Mapping) else {}
    mask, labels = given.get("attention_mask"), given.get("labels")
    kept = mask.bool() if isinstance(mask, Tensor) else None
    if told(spec).use_label_mask and isinstance(labels, Tensor):
        labelled = labels != told(spec).label_mask_value
        kept = labelled if kept is None else kept & labelled if kept.shape == labelled.shape else kept
    return kept


def limit(spec: LoraConfig, sites: Sequence[WeightSite]) -> int:
    """How many ranks a site can get at most, of those that read the same."""
    return max(round(spec.rank_for(site.name) * told(spec).rho) for site in sites)


def observe(spec: LoraConfig, sites: Sequence[WeightSite], x: Tensor, state: Directions | None) -> Directions | None:
    """The directions after the rows `x`. Fewer rows than directions say nothing."""
    count = limit(spec, sites)
    if count > x.shape[1]:
        raise AdapterError(
            f"{sites[0].fqn}: its inputs have {x.shape[1]} features, so no {count} directions (r·rho); lower r, or rho in"
            " eva_config"
        )
    if len(x) < count:
        return state
    return turned(state, x, count, told(spec).tau)


def settled(spec: LoraConfig, states: Mapping[str, Any]) -> set[str]:
    """The sites whose directions have settled, as many as they get of the ranks."""
    known = {site: state for site, state in states.items() if state is not None}
    if len(known) < len(states):
        return {site for site, state in known.items() if bool(state.settled.all())}
    ranks = allotted(spec, states)
    return {site for site, state in states.items() if bool(state.settled[: ranks[site]].all())}


def allotted(spec: LoraConfig, states: Mapping[str, Directions]) -> dict[str, int]:
    """How many ranks each site gets: the directions of all sites by what they explain, as many as there are ranks."""
    first = {id(state): site for site, state in reversed(list(states.items()))}
    leaders = [site for site in states if first[id(states[site])] == site]
    followers = {
        site: leader for leader in leaders for site in states if site != leader and states[site] is states[leader]
    }
    pairs = [(site, share) for site in (*leaders, *followers) for share in states[site].explained]
    order = torch.stack([share for _, share in pairs]).argsort(descending=True)
    budget = sum(spec.rank_for(site) for site in states)
    ranks = dict.fromkeys(states, 0)
    for place in order[:budget].tolist():
        ranks[pairs[place][0]] += 1
    for site, leader in followers.items():
        ranks[leader], ranks[site] = max(ranks[leader], ranks[site]), min(ranks[leader], ranks[site])
    return ranks


def decide(spec: LoraConfig, states: Mapping[str, Directions]) -> tuple[LoraConfig, Mapping[str, Tensor]]:
    """The spec with the ranks that the sites get, without those that get none; and A by site."""
    ranks, own = allotted(spec, states), told(spec)
    alphas = {
        site: spec.alpha_for(site) * (rank / spec.rank_for(site) if own.adjust_scaling_factors else 1)
        for site, rank in ranks.items()
    }
    kept = {site: rank for site, rank in ranks.items() if rank}
    update: dict[str, Any] = {
        "rank_pattern": exact_patterns(kept, None if spec.rank_pattern else spec.r),
        "alpha_pattern": exact_patterns(
            {site: alphas[site] for site in kept}, None if spec.alpha_pattern else spec.lora_alpha
        ),
    }
    for name, found in update.items():
        update[name] = {**found, **getattr(spec, name)}
    gone = [re.escape(site) for site in ranks if site not in kept]
    if gone:
        update["exclude_modules"] = "|".join([*_as_regex(spec.exclude_modules), *gone])
    data: dict[str, Tensor] = {}
    for site, rank in kept.items():
        found, values = states[site].directions[:rank], states[site].values[:rank]
        data[site] = found / values.sqrt()[:, None] if own.whiten else found
    return spec.model_copy(update=update), data


def _as_regex(names: str | tuple[str, ...] | None) -> list[str]:
    """`exclude_modules` in regular expressions, which sites can be added to by their whole names."""
    if isinstance(names, str):
        return [f"(?:{names})"]
    return [rf"(?:.*\.)?{re.escape(name)}" for name in names or ()]
