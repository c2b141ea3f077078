"""PEFT's hot-swapping: an adapter takes another's values, rank and scaling, and torch.compile compiles nothing anew."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from peftc.api import load_spec
from peftc.checkpoint import adapter_state_dict, load_state, locate, read_adapter
from peftc.checkpoint.state import fit_of
from peftc.errors import AdapterError
from peftc.graph.finding import module_at
from peftc.peft.configs import spec_of
from peftc.peft.rooted import root_in
from peftc.peft.roots import Root, adopt, take
from peftc.rewrite.switch import activate

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

# What two configs may differ in: of no effect on the values, or what a swap brings into line.
_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "target_modules")
_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
# What is no change at all where it is zero.
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_OTHER = (*_ORIGIN, *_RANKS, "lora_dropout", "init_lora_weights", "exclude_modules")


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise AdapterError (a ValueError) if adapters of these configs can't take each other's place."""
    one, other = spec_of(config0).to_dict(), spec_of(config1).to_dict()
    differing = [key for key in {**one, **other} if key not in _OTHER and one.get(key) != other.get(key)]
    if differing:
        key = differing[0]
        raise AdapterError(
            f"hot-swapping: the adapters differ in {', '.join(differing)} ({key}: {one.get(key)!r} and {other.get(key)!r})."
            " Load the new one beside the old (load_adapter, set_adapter); torch.compile compiles nothing anew for that if"
            " the shapes are the same"
        )


def hotswap_adapter_from_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """Give an adapter the values, scaling and rank of another, by the keys of files, with or without its name in them.

    A lower rank is filled up with zeros to that of the adapter, a module that the other lacks gets zeros; a higher rank
    makes the adapter larger, for which torch.compile compiles anew. Raises AdapterError if the configs differ otherwise,
    CheckpointError if keys are too many; nothing is changed then.
    """
    root = root_in(model)
    program = root.program
    check_hotswap_configs_compatible(program.plan.adapters[adapter_name].to_dict(), config)
    plain = {key.replace(f".{adapter_name}.", "."): value for key, value in state_dict.items()}
    prefix = program.adapters[adapter_name].spec.key_prefix
    given = {key if key.startswith("base_model.") else prefix + key: value for key, value in plain.items()}
    _swap(root, adapter_name, spec_of(config), given)


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike[str], adapter_name: str, torch_device: Any = None, **kwargs: Any
) -> None:
    """Give an adapter the values of one from a folder or a Hub repository. Raises as `hotswap_adapter_from_state_dict`."""
    folder = locate(model_name_or_path, kwargs.pop("subfolder", None), **kwargs)
    files = read_adapter(folder, allow_pickle=True)
    hotswap_adapter_from_state_dict(model, files.tensors, adapter_name, load_spec(folder))


def prepare_model_for_compiled_hotswap(
    model: Any, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Fill all adapters up with zeros to `target_rank`, and note it in `config` (one, or several by name).

    Without a rank nothing has to be prepared: scalings are tensors here. `check_compiled`: `error`, `warn` or `ignore`, if
    the model is compiled already, which would be compiled anew.

    Raises AdapterError (a ValueError) then, and if an adapter has a higher rank, or none.
    """
    from torch._dynamo.eval_frame import OptimizedModule  # Late, as it takes its time.

    compiled = isinstance(model, OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None
    if compiled and check_compiled != "ignore":
        text = "prepare_model_for_compiled_hotswap: the model is compiled already; prepare it before torch.compile"
        if check_compiled == "error":
            raise AdapterError(text)
        warnings.warn(text, stacklevel=2)
    root = root_in(model)
    if target_rank is None:
        return
    for name in list(root.program.adapters):
        ranks = list(_ranks(root, name).values())
        if not ranks or max(ranks) > target_rank:
            has = f"rank {max(ranks)}" if ranks else "no rank"
            raise AdapterError(f"target_rank={target_rank}: adapter {name!r} has {has}. Give the largest rank of all")
    for name in list(root.program.adapters):
        state = {key: value.detach().clone() for key, value in adapter_state_dict(root.program, name).items()}
        _swap(root, name, root.program.adapters[name].spec, state, target_rank)
    for one in config.values() if isinstance(config, dict) else [] if config is None else [config]:
        one.r = target_rank
        one.rank_pattern = dict.fromkeys(one.rank_pattern or {}, target_rank)


def _ranks(root: Root, name: str) -> dict[str, int]:
    """The rank of an adapter at each of its sites that has one."""
    edits = root.program.adapters[name].edits
    return {edit.site: r for edit in edits if isinstance(r := edit.constants.get("r"), int)}


@dataclass(frozen=True)
class _Size:
    """The rank of an adapter at a site, and its alpha."""

    r: int
    alpha: float


def _swap(root: Root, name: str, other: Any, given: Mapping[str, Tensor], at_least: int = 1) -> None:
    """Let adapter `name` be one with the values of `given` and the scalings of spec `other`, of its own rank or more."""
    program, compiled = root.program, root.compiled
    own: Any = program.adapters[name].spec
    if own.peft_type != "LORA":
        load_state(program, name, given, where="hot-swapping")
        return
    sizes: dict[str, _Size] = {}
    for site, rank in _ranks(root, name).items():
        r = max(rank, other.rank_for(site), at_least)
        sizes[site] = _Size(r, other.scaling_for(site) * (math.sqrt(r) if own.use_rslora else r))
    if all(size == _Size(own.rank_for(site), own.alpha_for(site)) for site, size in sizes.items()):
        load_state(program, name, _filled(root, name, other, given), where="hot-swapping")
        return
    spec = _sized(own, sizes)
    beside = next(free for i in range(len(program.adapters) + 1) if (free := f"{name}_{i}") not in program.adapters)
    # One of them is there at any time, so that what the hosts run, and what was compiled of it, stays.
    compiled.add_adapter(beside, spec)
    try:
        tensors = _filled(root, beside, other, given)
        load_state(program, beside, tensors, where="hot-swapping")
    except Exception:  # Whatever it is, the adapter beside goes.
        compiled.delete_adapter(beside)
        raise
    active, learning = program.active, program.learning
    compiled.delete_adapter(name)
    compiled.add_adapter(name, spec)
    load_state(program, name, tensors, where="hot-swapping")
    activate(program, active, learning)
    compiled.delete_adapter(beside)
    take(root, name)
    adopt(root)


def _sized(spec: Any, sizes: Mapping[str, _Size]) -> Any:
    """`spec` with the commonest size for all, and patterns for the others."""
    usual = Counter(sizes.values()).most_common(1)[0][0]
    odd = {site: size for site, size in sizes.items() if size != usual}
    return spec.model_copy(
        update={
            "r": usual.r,
            "lora_alpha": usual.alpha,
            "rank_pattern": {site: size.r for site, size in odd.items()},
            "alpha_pattern": {site: size.alpha for site, size in odd.items()},
            "init_lora_weights": True,
        }
    )


def _filled(root: Root, name: str, other: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`given` as large as the parameters of adapter `name`, with zeros for what it lacks."""
    fit, tensors = fit_of(root.program, name, given), dict(given)
    for key in fit.result.missing_keys:
        if any(f".{factor}" in key for factor in _FACTORS):
            tensors[key] = torch.zeros_like(fit.own[key])
    ranks = {other.rank_for(site) for site in _ranks(root, name)}
    modules = {site: module_at(root.program.base, site) for site in _ranks(root, name)}
    grouped = [site for site, module in modules.items() if isinstance(module, _ConvNd) and module.groups > 1]
    for key, shape, wanted in fit.result.mismatched_keys:
        same = len(shape) == len(wanted)
        differing = [i for i, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b] if same else []
        if len(differing) != 1 or shape[differing[0]] not in ranks or any(f".{site}." in key for site in grouped):
            raise AdapterError(
                f"hot-swapping: {key} is {shape}, and can't be filled up to {wanted}. Load the new adapter beside the old"
                " (load_adapter, set_adapter)"
            )
        source = fit.result.renamed.get(key, key)
        padding = [0, 0] * (len(shape) - 1 - differing[0]) + [0, wanted[differing[0]] - shape[differing[0]]]
        tensors[source] = F.pad(tensors[source], padding)
    return tensors
