"""Adapters of transformers 4, which had a linear for each expert, on the fused experts of transformers 5.

An expert's change of `gate_up_proj` is that of its two linears, one above the other: [Bg·Ag; Bu·Au] is B·A with
A = [Ag; Au] and B block-diagonal, of the sum of their ranks. Linears that the file does not adapt are zeros.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peftc.specs.selection import pattern_matches

from .config import LoraConfig

_KEY = re.compile(r"^(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<linear>\w+)\.lora_(?P<factor>[AB])\.weight$")
# What the linears of an expert were called, by the fused weight and in the order of its rows.
_LINEARS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
_KNOWN = {name for pairs in _LINEARS.values() for pair in pairs for name in pair}
# By expert and linear, the factors "A" and "B", the latter times the scaling.
Factors = dict[tuple[int, str], dict[str, Tensor]]


def fused(spec: LoraConfig, model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, Mapping[str, Tensor]]:
    """Spec and tensors as adapters of `model` have them, if the file's are of linears for each expert; else as they are."""
    groups, others, prefix = dict[str, Factors](), dict[str, Tensor](), spec.key_prefix
    paths = {found["experts"].removeprefix(prefix) for key in tensors if (found := _KEY.match(key))}
    known = dict(model.named_modules()) if paths else {}
    places = {path: _place(known, path) for path in paths}
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        place = places[found["experts"].removeprefix(prefix)] if found and found["linear"] in _KNOWN else None
        if found is None or place is None:
            others[key] = tensor
            continue
        own = groups.setdefault(place, {}).setdefault((int(found["expert"]), found["linear"]), {})
        scaling = spec.scaling_for(_module(key, prefix)) if found["factor"] == "B" else 1.0
        own[found["factor"]] = tensor * scaling
    if not groups:
        return spec, tensors
    ranks, alphas, names = dict[str, int](), dict[str, float](), list[str]()
    for place, factors in groups.items():
        depth = ""
        for weight in reversed([name for name in _LINEARS if _has(factors, name)]):
            rank, made = _stacked(model.get_submodule(place), weight, factors)
            name = f"{place}.{weight}"
            ranks[re.escape(name)], alphas[re.escape(name)] = rank, _alpha(spec, rank)
            names.append(name)
            others |= {f"{prefix}{place}{depth}.lora_{factor}.weight": value for factor, value in made.items()}
            depth = ".base_layer"
    own = tuple(prefix + place for place in groups)
    ends = {_module(key, prefix).rpartition(".")[2] for key in others if ".lora_" in key and not key.startswith(own)}
    update = {
        "target_modules": tuple(sorted(ends)),
        "target_parameters": (*(spec.target_parameters or ()), *names),
        "rank_pattern": {**ranks, **_left(spec.rank_pattern, tensors, others, prefix)},
        "alpha_pattern": {**alphas, **_left(spec.alpha_pattern, tensors, others, prefix)},
    }
    return spec.model_copy(update=update), others


def _left(patterns: Mapping[str, Any], old: Iterable[str], new: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Without the patterns that were of the experts' linears alone: what they say is in the tensors now."""
    names = {_module(key, prefix) for key in old if key not in new}
    others = {_module(key, prefix) for key in new}
    gone = {
        pattern
        for pattern in patterns
        if any(pattern_matches(pattern, name) for name in names)
        and not any(pattern_matches(pattern, name) for name in others)
    }
    return {pattern: value for pattern, value in patterns.items() if pattern not in gone}


def _place(known: Mapping[str, nn.Module], path: str) -> str | None:
    """The fused experts of `model` that `path` is, whatever the block they are in is called; None if there are none."""
    parent = path.rpartition(".")[0].rpartition(".")[0]
    candidates = [path, *(fqn for fqn in known if fqn.startswith(f"{parent}.") and fqn.endswith(".experts"))]
    return next((fqn for fqn in candidates if fqn in known and _is_fused(known[fqn])), None)


def _is_fused(module: Any) -> bool:
    weights = [module._parameters.get(name) for name in _LINEARS]
    stacked = all(weight is not None and weight.dim() == 3 for weight in weights)
    return stacked and bool(module.__dict__.get("is_concatenated", True))


def _has(factors: Factors, weight: str) -> bool:
    names = {name for pair in _LINEARS[weight] for name in pair}
    return any(linear in names for _, linear in factors)


def _stacked(experts: nn.Module, weight: str, factors: Factors) -> tuple[int, dict[str, Tensor]]:
    """The rank, and A (experts · r, in) and B (out, r · experts) of a fused weight, at the scaling 1."""
    shape = experts.get_parameter(weight).shape
    count, (out, size) = shape[0], shape[:0:-1] if experts.__dict__.get("is_transposed") else shape[1:]
    parts = [
        [factors.get((e, n)) for e in range(count) for n in pair if (e, n) in factors] for pair in _LINEARS[weight]
    ]
    rank_of = [max((part["A"].shape[0] for part in own if part), default=0) for own in parts]
    rank, like = sum(rank_of), next(part["A"] for own in parts for part in own if part)
    a, b = like.new_zeros(count, rank, size), like.new_zeros(count, out, rank)
    rows = out // len(parts)
    for number, pair in enumerate(_LINEARS[weight]):
        at, row = sum(rank_of[:number]), number * rows
        for (expert, linear), part in factors.items():
            if linear in pair:
                r = part["A"].shape[0]
                a[expert, at : at + r] = part["A"]
                b[expert, row : row + rows, at : at + r] = part["B"]
    return rank, {"A": a.flatten(0, 1), "B": b.permute(1, 2, 0).flatten(1).contiguous()}


def _alpha(spec: LoraConfig, rank: int) -> float:
    """The alpha with which the scaling is 1: that of every linear is in B."""
    return math.sqrt(rank) if spec.use_rslora else float(rank)


def _module(key: str, prefix: str) -> str:
    """The name of the module that a key is of."""
    return key.removeprefix(prefix).partition(".lora_")[0]
