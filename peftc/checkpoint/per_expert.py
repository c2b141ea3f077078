"""LoRA on fused experts as one linear for each expert, named as in the model's own checkpoints: as transformers 4 has it.

An expert's linear is some rows of a fused weight: its factors are those rows of `up`, and `down`, without the
components that lead to none of its rows. Which rows, and what the linear is called, transformers' converters tell.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.base import originals
from peftc.checkpoint.embeddings import SaveEmbeddings
from peftc.checkpoint.state import key_of, saved_state_dict
from peftc.errors import CheckpointError
from peftc.graph.sites import Site, WeightSite, canonical, is_pretrained
from peftc.plan import Edit
from peftc.registry import rules_of
from peftc.rewrite.parts import Part
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import whole
from peftc.rule import Factors

_WHY = "form='per_expert'"


@dataclass(frozen=True)
class _Linear:
    """A linear of transformers 4: rows `start` to `stop` of an expert's matrix in the fused weight."""

    name: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Target:
    """A module that the adapter is on, with its rank and scaling."""

    name: str
    r: int
    scaling: float


def per_expert_form(
    program: Program, adapter: str, config: dict[str, Any], save_embedding_layers: SaveEmbeddings
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors (by PEFT's keys) of `adapter` with a linear for each expert, at the scale that is set.

    Raises CheckpointError for other methods than LoRA, for models without such experts, and for adapted weights that the
    model's own checkpoints have in another shape.
    """
    spec, edits = program.adapters[adapter].spec, program.adapters[adapter].edits
    if not any(rule.offers("factors") for rule in rules_of(spec)):
        raise CheckpointError(
            f"{_WHY}: {adapter!r} is {spec.peft_type}; adapters of linears for each expert are LoRA's"
        )
    sites = {edit.site: program.plan.sites[edit.site] for edit in edits}
    stacks = {fqn: site for fqn, site in sites.items() if isinstance(site, WeightSite) and site.experts}
    if not stacks:
        raise CheckpointError(f"{_WHY}: {adapter!r} adapts no fused experts; save it without form")
    names, modules = _stored(program)
    state, targets, moved = saved_state_dict(program, adapter, save_embedding_layers), list[_Target](), dict[str, str]()
    for edit in edits:
        keys = {param: key_of(spec, edit, param) for param in edit.params if param.saved}
        if edit.site in stacks:
            state = {key: tensor for key, tensor in state.items() if key not in keys.values()}
            for linear, up, down, scale in _split(
                program.adapters[adapter].part(edit), _linears(program.base, stacks[edit.site])
            ):
                targets.append(_Target(linear, down.shape[0], scale))
                own = spec.key_prefix + linear
                state |= {f"{own}.lora_A.weight": down.contiguous(), f"{own}.lora_B.weight": up.contiguous()}
            continue
        there = _owner(names, _module(sites[edit.site], edit))
        moved |= {old: key_of(spec, replace(edit, saved_as=there), param) for param, old in keys.items()}
        if not edit.whole:
            targets.append(_Target(there, *_rank_and_scaling(edit)))
        elif not any(there == name or there.endswith(f".{name}") for name in config["modules_to_save"]):
            raise CheckpointError(f"{_WHY}: {edit.site}, saved whole, is {there} in this model's checkpoints")
    prefix = spec.key_prefix
    others = {key: prefix + names.get(key.removeprefix(prefix), key.removeprefix(prefix)) for key in state}
    return _config(config, targets, modules), {moved.get(key, others[key]): value for key, value in state.items()}


def _rank_and_scaling(edit: Edit) -> tuple[int, float]:
    r, scaling = edit.constants["r"], edit.constants["scaling"]
    return cast(int, r), cast(float, scaling)


def _module(site: Site, edit: Edit) -> str:
    """The module that an edit which stays as it is adapts; the router's parameter was the weight of one."""
    if not isinstance(site, WeightSite) or site.host is None:
        return edit.site
    if site.known_as is not None or not site.fqn.endswith(".weight"):
        raise CheckpointError(
            f"{_WHY}: {site.fqn} is a parameter that no linear held; take it out of target_parameters"
        )
    return site.host


def _stored(program: Program) -> tuple[dict[str, str], list[str]]:
    """What parameters are called in checkpoints, of those that are one tensor there; and all modules that have a weight."""
    if not is_pretrained(program.base):
        raise CheckpointError(f"{_WHY}: only models of transformers tell what the linears of their experts are called")
    shapes = {name: tensor.shape for name, tensor in originals(program, program.given.requires_grad).items()}
    plain = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    stored = _reverted(program.base, plain)
    made = {id(tensor): name for name, tensor in stored.items()}
    names = {name: made[id(tensor)] for name, tensor in plain.items() if id(tensor) in made}
    return names, [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]


def _reverted(base: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, by parameter of the model, as transformers writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(cast(Any, base), dict(tensors))


def _linears(base: nn.Module, stack: WeightSite) -> list[_Linear]:
    """Found by having the numbers of the rows converted."""
    count, rows = stack.experts or 0, stack.out_features
    numbered = canonical(torch.arange(count * rows).view(count, rows, 1), stack)
    linears: list[_Linear] = []
    for name, part in _reverted(base, {str(stack.weight): numbered}).items():
        start, length = int(part.flatten()[0]), part.numel()
        if part.dim() != 2 or part.shape[1] != 1 or part.flatten().tolist() != list(range(start, start + length)):
            raise CheckpointError(
                f"{_WHY}: {stack.fqn} is {name} in this model's checkpoints, not a linear for each expert"
            )
        linears.append(_Linear(name.removesuffix(".weight"), start // rows, start % rows, start % rows + length))
    return linears


def _split(part: Part, linears: list[_Linear]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """By linear the factors up (out, r) and down (r, in), and the scaling. The ranks of all experts are the same."""
    values = {name: whole(tensor.detach()) for name, tensor in part.tensors().items()}
    made = part.edit.rule.factors(part.bound(**values))
    assert isinstance(made, Factors), "the sites are those of a method that has them"
    for own in _alike(linears).values():
        ups = torch.stack([made.up[linear.expert, linear.start : linear.stop] for linear in own])
        used = ups.ne(0).flatten(0, 1).any(0)
        used = used if used.any() else torch.ones_like(used)
        for linear, up in zip(own, ups, strict=True):
            yield linear.name, up[:, used], made.down[linear.expert, used], float(made.scale)


def _alike(linears: Iterable[_Linear]) -> dict[tuple[int, int], list[_Linear]]:
    """The linears of all experts that are the same rows of theirs."""
    groups: dict[tuple[int, int], list[_Linear]] = {}
    for linear in linears:
        groups.setdefault((linear.start, linear.stop), []).append(linear)
    return groups


def _owner(names: Mapping[str, str], module: str) -> str:
    """What `module` is called in checkpoints, from its parameters."""
    own = {name: names.get(name) for name in names if name.startswith(f"{module}.")}
    ends = {
        stored.removesuffix(tail) if stored is not None and stored.endswith(tail) else None
        for name, stored in own.items()
        if (tail := name.removeprefix(module))
    }
    if len(ends) != 1 or None in ends:
        raise CheckpointError(f"{_WHY}: {module} is no module in this model's checkpoints, but fused or split")
    return str(ends.pop())


def _config(config: dict[str, Any], targets: Sequence[_Target], others: Iterable[str]) -> dict[str, Any]:
    """`config` for `targets`, which are told from `others`, the modules that there are beside them."""
    r, root = int(config["r"]), bool(config["use_rslora"])
    ranks, alphas = dict[str, int](), dict[str, float]()
    for target in targets:
        alpha, pattern = target.scaling * (math.sqrt(target.r) if root else target.r), _pattern(target.name)
        if target.r != r:
            ranks[pattern] = target.r
        if not math.isclose(alpha, config["lora_alpha"], rel_tol=1e-12):
            alphas[pattern] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    own = {target.name for target in targets}
    ends = sorted({name.rpartition(".")[2] for name in own})
    selected = {name for name in others if name.rpartition(".")[2] in ends}
    chosen = ends if selected <= own else "|".join(dict.fromkeys(_pattern(name) for name in own))
    return {
        **config,
        "target_modules": chosen,
        "target_parameters": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _pattern(name: str) -> str:
    """A regular expression for a module, and for that of the other experts beside it."""
    return re.sub(r"(experts\\\.)\d+", r"\1\\d+", re.escape(name))
