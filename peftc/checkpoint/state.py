"""An adapter's tensors under the keys that PEFT's files use, and back."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftc.checkpoint.embeddings import SaveEmbeddings, embedding_state, places_of, split_embeddings, take_over
from peftc.checkpoint.keys import LoadResult, require_fit
from peftc.checkpoint.spelling import by_plain_names, respelled, unwrapped
from peftc.errors import CheckpointError
from peftc.graph.finding import parameter_at
from peftc.graph.sites import dtype_name, parameter_name
from peftc.merge.fold import is_finite
from peftc.plan import Edit, PlannedParam
from peftc.prompts.files import PROMPT_KEY, is_reparameterised, load_prompt, prompt_part, prompt_state
from peftc.prompts.find import is_virtual
from peftc.registry import rules_of
from peftc.rewrite.build import start_alone
from peftc.rewrite.parts import Adapter
from peftc.rewrite.processes import require_unflattened
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_sharded, put, reshard, whole
from peftc.specs import AdapterSpec


def adapter_state_dict(program: Program, adapter: str) -> dict[str, Tensor]:
    """The live tensors of `adapter` by their key in `adapter_model.safetensors`; the rows of a prompt are computed."""
    state: dict[str, Tensor] = {}
    own = program.adapters[adapter]
    prefix = own.spec.key_prefix
    for part in own.parts.values():
        if is_virtual(part.edit):
            state |= prompt_state(part)
            continue
        for param in part.edit.params:
            if param.saved:
                state[key_of(own.spec, part.edit, param)] = part.tensor(param.key)
    for tensor in program.plan.trained:
        if tensor.adapter == adapter:
            state[prefix + unwrapped(tensor.key)] = _trained(program, tensor.name, adapter)
    return state


def saved_state_dict(
    program: Program,
    adapter: str,
    save_embedding_layers: SaveEmbeddings = "auto",
    full: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of `adapter` as its file holds them. `full`: a state dict of the whole model to take them from.

    Raises CheckpointError if `full` lacks one.
    """
    reshard(program.base)  # What FSDP2 has gathered for a call may be rounded.
    if full is None:
        require_unflattened(
            program.adapters[adapter],
            CheckpointError,
            "Pass state_dict=, the whole model's, on the process that saves (a Trainer does), or save inside of"
            " FullyShardedDataParallel.summon_full_params.",
        )
    own = program.adapters[adapter]
    prefix, stored = own.spec.key_prefix, stored_as(own)
    state = adapter_state_dict(program, adapter) if full is None else _from_full(program, adapter, full)
    state |= embedding_state(program, adapter, prefix, save_embedding_layers, by_plain_names(full or {}))
    state = {key: whole(value) for key, value in state.items()}
    state = {key: value * stored[key] if key in stored else value for key, value in state.items()}
    state |= _transposed(own, state)
    return filed(program, adapter, state)[1]


def _transposed(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files have once more, for ends of ties that follow."""
    spec = adapter.spec
    return {
        spec.key_prefix + parameter_name(unwrapped(edit.site), key): state[key_of(spec, edit, param)].T.contiguous()
        for edit in adapter.edits
        for param in edit.params
        if (key := edit.rule.again.get(param.key)) is not None
    }


def spec_filed(program: Program, adapter: str) -> AdapterSpec:
    """The spec of an adapter as files have it."""
    spec = program.plan.adapters[adapter]
    if not any(rule.offers("filed") for rule in rules_of(spec)):
        return spec
    return filed(program, adapter, {key: whole(value) for key, value in adapter_state_dict(program, adapter).items()})[
        0
    ]


def filed(program: Program, adapter: str, state: dict[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """The spec and the tensors by key, of an adapter whose tensors are `state`, as its rules have them in files."""
    own, spec = program.adapters[adapter], program.plan.adapters[adapter]
    for rule in (rule for rule in rules_of(spec) if rule.offers("filed")):
        keys = {
            edit.site: {param.name: key_of(own.spec, edit, param) for param in edit.params if param.saved}
            for edit in own.edits
            if edit.rule == rule
        }
        tensors = {site: {name: state[key] for name, key in names.items()} for site, names in keys.items()}
        spec, new = rule.filed(spec, tensors, own.states.get(rule.name, {}))
        state = {key: value for key, value in state.items() if not any(key in own.values() for own in keys.values())}
        for site, values in new.items():
            others = {name: spec.key_prefix + parameter_name(site, name) for name in values}
            state |= {(others | keys[site])[name]: value for name, value in values.items()}
    return spec, state


def stored_as(adapter: Adapter) -> dict[str, float]:
    """By key, how many times a tensor files hold, where that is not once. Powers of two, so that it is exact."""
    pairs = [(edit, param) for edit in adapter.edits for param in edit.params if param.stored != 1]
    return {key_of(adapter.spec, edit, param): param.stored for edit, param in pairs}


def _from_full(program: Program, adapter: str, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors out of a whole model's (gathered by FSDP or a trainer; names may carry their wrappers)."""
    plain = by_plain_names(full)
    part = prompt_part(program.adapters[adapter])
    makes = part is not None and is_reparameterised(part.edit)
    if part is not None and makes and any(is_sharded(tensor) for tensor in part.tensors().values()):
        raise CheckpointError(
            f"{adapter!r}: an encoder makes its rows, whose tensors are sharded, and state_dict has no rows. Call"
            " save_pretrained on all processes, without state_dict."
        )
    live = {id(tensor): name for name, tensor in _named(program.base)}
    state: dict[str, Tensor] = {}
    for key, tensor in adapter_state_dict(program, adapter).items():
        name = live.get(id(tensor))
        name = None if name is None else unwrapped(name)
        if name is not None and name not in plain:
            raise CheckpointError(f"state_dict lacks {name}, which adapter {adapter!r} has")
        state[key] = tensor if name is None else plain[name]
    return state


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def key_of(spec: AdapterSpec, edit: Edit, param: PlannedParam) -> str:
    """The key of a tensor in files; one that all sites share is named after the model."""
    if param.shared:
        return f"base_model.{param.key}"
    return spec.key_prefix + parameter_name(unwrapped(edit.site if edit.saved_as is None else edit.saved_as), param.key)


def _trained(program: Program, name: str, adapter: str) -> Tensor:
    """The value of a bias as its adapter trained it, whether that is in the model now, merged over, or put aside."""
    overlay = program.overlay
    if overlay.present[name] == adapter:
        under = {parameter_name(item.owner, item.leaf): item.original for item in program.merge.replaced}
        original = under.get(name)
        return parameter_at(program.base, name) if original is None else original
    return overlay.aside[name, adapter]


def load_state(
    program: Program,
    adapter: str,
    tensors: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor] | None = None,
    *,
    where: str = "the state dict",
    strict: bool = True,
    resized: bool = True,
    attached: bool = False,
) -> LoadResult:
    """Copy `tensors` into the parameters of `adapter`; of a prompt that is to be trained, `encoder` makes them.

    `attached`: the adapter has just been, without values, so what is not in `tensors` is initialised.

    A saved embedding (PEFT's `save_embedding_layers`) is compared with the base and taken over, with a warning, if it
    differs. Raises CheckpointError, with nothing copied, on NaN, Inf or integers, and with `strict` on missing, unexpected
    or mis-shaped keys; else these are left out, with a warning (mis-shaped ones only if `resized`).
    """
    require_unflattened(program.adapters[adapter], CheckpointError, "Load before the model is wrapped.")
    fit = fit_of(program, adapter, tensors)
    odd = bool(fit.result.mismatched_keys)
    left = require_fit(fit.result, fit.own, where, strict or (odd and not resized))
    values = {key: tensors[source] for key, source in fit.sources.items()}
    require_values(program, adapter, values, fit, where)
    _copy(program, adapter, {key: value for key, value in values.items() if key in fit.own}, fit.own, encoder or {})
    _start_others(program, adapter, fit, tables_only=not attached)
    for key, name in fit.embeddings.items():
        if key in values:
            take_over(program, adapter, name, values[key])
    report(fit.result, left, where)
    return fit.result


@dataclass(frozen=True)
class Fit:
    """How a file's tensors are those of an adapter. `own`: its live tensors by key; `sources`: the file's key of what fits.

    `embeddings`: base parameters by the key under which the file brings one.
    """

    own: Mapping[str, Tensor]
    sources: Mapping[str, str]
    embeddings: Mapping[str, str]
    result: LoadResult


def fit_of(program: Program, adapter: str, tensors: Mapping[str, Tensor]) -> Fit:
    """Find the place of each of `tensors`, by their names, shapes and dtypes alone."""
    own, spec = adapter_state_dict(program, adapter), program.adapters[adapter].spec
    again = _again(program.adapters[adapter])
    wanted = [
        key for key in tensors if key in own or (".original_module." not in key and again.get(key) not in tensors)
    ]
    names = respelled(program.base, spec, wanted, own, program.given.requires_grad)
    given = {new: (old, tensors[old]) for old, new in names.items()}
    embeddings, unexpected = split_embeddings(program, spec, [key for key in given if key not in own])
    targets = {**own, **{key: parameter_at(program.base, name) for key, name in embeddings.items()}}
    optional = _optional(program.adapters[adapter])
    pairs = {key: (old, value, targets[key]) for key, (old, value) in given.items() if key in targets}
    fitting = {key: pair for key, pair in pairs.items() if pair[1].shape == pair[2].shape}
    result = LoadResult(
        missing_keys=tuple(key for key in own if key not in given and key not in optional),
        unexpected_keys=tuple(unexpected),
        mismatched_keys=tuple(
            (key, tuple(value.shape), tuple(target.shape))
            for key, (_, value, target) in pairs.items()
            if key not in fitting
        ),
        renamed={new: old for old, new in names.items() if old != new},
        casts={
            key: (dtype_name(value.dtype), dtype_name(target.dtype))
            for key, (_, value, target) in fitting.items()
            if value.dtype != target.dtype
        },
    )
    return Fit(own, {key: old for key, (old, _, _) in fitting.items()}, embeddings, result)


def _again(adapter: Adapter) -> dict[str, str]:
    """By the key under which a file may have a tensor once more, of a site that follows another one, its first key."""
    edits, spec = adapter.edits, adapter.spec
    places = places_of(edits)
    found: dict[str, str] = {}
    for edit in (edit for edit in edits if edit.follows is not None and edit.saved_as is not None):
        for param in edit.params:
            again = edit.rule.again.get(param.key, param.key)
            found[spec.key_prefix + parameter_name(unwrapped(places[edit.site]), again)] = key_of(spec, edit, param)
    return found


def _start_others(program: Program, adapter: str, fit: Fit, tables_only: bool) -> None:
    """Initialise what the file has not; `tables_only`: of an adapter that has values, what follows from its spec alone."""
    own = program.adapters[adapter]
    for edit in own.edits:
        others = [param for param in edit.params if key_of(own.spec, edit, param) not in fit.sources]
        others = [param for param in others if param.is_table] if tables_only else others
        if others and edit.rule.container is None and edit.follows is None:
            start_alone(program, edit, others)


def _copy(
    program: Program,
    name: str,
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
) -> None:
    adapter = program.adapters[name]
    part, stored = prompt_part(adapter), stored_as(adapter)
    reshard(program.base)
    with torch.no_grad():
        for key, value in values.items():
            if part is not None and key == PROMPT_KEY:
                load_prompt(adapter, part, value, encoder)
            else:
                put(own[key], value / stored[key] if key in stored else value)


def require_values(program: Program, adapter: str, values: Mapping[str, Tensor], fit: Fit, where: str) -> None:
    """Raise CheckpointError if one of `values`, by the adapter's key, is not finite, or integers where floats belong."""
    buffers = _buffers(program.adapters[adapter])
    for key, value in values.items():
        target = fit.own[key] if key in fit.own else parameter_at(program.base, fit.embeddings[key])
        _require_value(key, value, target.dtype, where, finite=key not in buffers)


def _require_value(key: str, value: Tensor, dtype: torch.dtype, where: str, finite: bool) -> None:
    if dtype.is_floating_point and not value.is_floating_point():
        raise CheckpointError(f"{where}: {key}: the file has {value.dtype}, a floating-point tensor is expected")
    if finite and value.is_floating_point() and not is_finite(value.to(dtype)):
        raise CheckpointError(f"{where}: {key}: holds NaN or Inf (as {dtype}); the adapter is broken")


def report(result: LoadResult, left: str | None, where: str) -> None:
    """Tell what a person would want to know of a load that went through."""
    if left is not None:
        warnings.warn(left, stacklevel=4)
    narrowed = [key for key, (old, new) in result.casts.items() if _BITS.get(new, 64) < _BITS.get(old, 0)]
    if narrowed:
        old, new = result.casts[narrowed[0]]
        warnings.warn(
            f"{where}: {len(narrowed)} tensors are rounded from {old} to {new} on loading ({narrowed[0]}, …)",
            stacklevel=4,
        )


# Bits of the significand.
_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


def _optional(adapter: Adapter) -> set[str]:
    """Keys of frozen starts, which files may lack: they are computed from the base weight, or drawn, then. And of tensors
    that are there by another key too.
    """
    keys = [(edit, param, key_of(adapter.spec, edit, param)) for edit in adapter.edits for param in edit.params]
    first = {key for edit, _, key in keys if edit.follows is None}
    starts = {key for _, param, key in keys if not param.trainable and param.init in ("rule", "gathered", "drawn")}
    return starts | {key for _, _, key in keys} - first


def _buffers(adapter: Adapter) -> set[str]:
    """Keys of buffers of modules saved whole, which may hold infinities (masks)."""
    return {
        key_of(adapter.spec, edit, param)
        for edit in adapter.edits
        for param in edit.params
        if edit.whole and not param.trainable
    }
