"""A fingerprint of the base model: enough to tell another model from the same one in another dtype."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from peftc.errors import CheckpointError
from peftc.graph.finding import modules_at, parameter_at
from peftc.graph.hooked import given_class
from peftc.graph.sites import WeightSite, parameter_name, transformers_config
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_flattened, is_sharded, own, values_at

_TENSORS = 32
_VALUES = 64
Sampler = Callable[[str, Tensor], str | None]


@dataclass(frozen=True)
class BaseFingerprint:
    """`architecture`: class and model type. `samples`: by parameter, its shape and a hash of 64 of its values.

    Values are hashed as bfloat16, so a base in float32 and its rounding are the same; those of float16 are rounded
    otherwise and compared among themselves only (`float16:` before the hash). `structure`: a hash of all names and shapes.
    """

    architecture: str
    structure: str
    samples: Mapping[str, str]


def fingerprint_of(program: Program, adapter: str, full: Mapping[str, Tensor] | None = None) -> BaseFingerprint:
    """The fingerprint of the base that `adapter` is trained on, with the weights of its own sites first.

    `full`: the tensors of the whole model by name, in the place of what is sharded, which one process alone can't read.

    Tensors that are not at hand (meta, quantised, merged into in place) are left out.
    """
    named = originals(program, program.given.requires_grad)
    if full is not None:
        flat = {name for name in named if is_flattened(parameter_at(program.base, name))}
        named = {
            name: full.get(name, tensor) if is_sharded(tensor) or name in flat else tensor
            for name, tensor in named.items()
        }
        named = {name: tensor for name, tensor in named.items() if not is_sharded(tensor)}
    heads = tuple(f"{edit.site}." for edit in program.plan.edits if edit.whole)
    whole = {name: t for name, t in named.items() if t.dim() >= 2 and not name.startswith(heads)}
    pairs = [(program.plan.sites[edit.site], edit.rule) for edit in program.adapters[adapter].edits]
    weights = {site.weight: rule for site, rule in pairs if isinstance(site, WeightSite)}
    whole = {name: t for name, t in whole.items() if name not in weights or not weights[name].replaces_rows}
    own = [name for name in whole if name in weights]
    chosen = dict.fromkeys([*_spread(own, _TENSORS * 3 // 4), *_spread(list(whole), _TENSORS // 4)])
    samples = {name: sample for name in chosen if (sample := _sample_of(name, whole[name])) is not None}
    return BaseFingerprint(_architecture(program.base), _structure(named), samples)


def require_base(program: Program, saved: BaseFingerprint, sample: Sampler | None = None) -> str | None:
    """Compare the base with the one an adapter was saved with; a caution if a part of it differs.

    `sample`: takes the samples by parameter, where the tensors of `program` are not the base's (on the meta device).

    Raises CheckpointError if half or more of the sampled weights are others: another model, or this one trained further.
    """
    named = originals(program, program.given.requires_grad)
    take = _sample_of if sample is None else sample
    pairs = {name: (before, take(name, named[name])) for name, before in saved.samples.items() if name in named}
    known = {name: pair for name, pair in pairs.items() if pair[1] is not None and _kind(pair[0]) == _kind(pair[1])}
    differ = [name for name, (before, now) in known.items() if before != now]
    here = _architecture(program.base)
    if not differ:
        other = here == saved.architecture and _structure(named) != saved.structure
        return (
            "the base model has tensors of other names or shapes than the one the adapter was trained on"
            if other
            else None
        )
    told = (
        f"{len(differ)} of {len(known)} sampled weights of the base model are not those the adapter was trained on:"
        f" {', '.join(differ[:3])}{', …' if len(differ) > 3 else ''}"
    )
    if 2 * len(differ) < len(known):
        return told
    other = f" The adapter's base was {saved.architecture}, this is {here}." if here != saved.architecture else ""
    raise CheckpointError(
        f"{told}.{other} Load the base it was trained on; or, if this one is meant, pass verify='files' (--verify files)."
    )


def originals(program: Program, names: Iterable[str]) -> dict[str, Tensor]:
    """The base's own parameters of these names, neither merged nor brought by an adapter; those gone for now left out."""
    overlay = program.overlay
    merged = {parameter_name(item.owner, item.leaf): item.original for item in program.merge.replaced}
    places = {name: name.rpartition(".") for name in names}
    modules = modules_at(program.base, {owner for owner, _, _ in places.values()})
    found: dict[str, Tensor | None] = {}
    for name, (owner, _, leaf) in places.items():
        if name in merged:
            found[name] = merged[name]
        elif overlay.present.get(name) is not None:
            found[name] = overlay.aside[name, None]
        else:
            found[name] = cast(Tensor, modules[owner]._parameters[leaf]).detach()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _structure(named: Mapping[str, Tensor]) -> str:
    lines = (f"{name}:{tuple(tensor.shape)};" for name, tensor in sorted(named.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _architecture(base: nn.Module) -> str:
    kind = getattr(transformers_config(base), "model_type", None)
    return given_class(original_class(base)).__name__ + (f" ({kind})" if kind else "")


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of `names`, evenly spaced, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _sample_of(_: str, tensor: Tensor) -> str | None:
    """The sample of a tensor in memory, or None if it has no values that can be compared."""
    local = own(tensor)
    if local.is_meta or type(local.data) is not Tensor or not tensor.is_floating_point() or tensor.itemsize < 2:
        return None
    shape = tuple(tensor.shape)
    values = values_at(tensor.detach(), torch.unravel_index(places(shape).to(local.device), shape)).cpu()
    return sample_from(values, shape)


def places(shape: tuple[int, ...]) -> Tensor:
    """Where a tensor is sampled: up to 64 evenly spaced positions in its flat order."""
    return torch.linspace(0, prod(shape) - 1, min(_VALUES, prod(shape)), dtype=torch.float64).round().long()


def sample_from(values: Tensor, shape: tuple[int, ...]) -> str:
    """The sample of a tensor of `shape` with these values at its `places`: a hash of both."""
    kind = "float16" if values.dtype == torch.float16 else "bfloat16"
    digest = hashlib.sha256(f"{shape}".encode())
    digest.update(values.to(getattr(torch, kind)).view(torch.int16).numpy().tobytes())
    return f"{kind}:{digest.hexdigest()[:16]}"


def _kind(sample: str | None) -> str:
    return (sample or "").partition(":")[0]
