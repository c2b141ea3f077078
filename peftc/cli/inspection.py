"""What an adapter's files say: whole or damaged, what is at each site, and how much that changes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import lcm, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.api import plan
from peftc.checkpoint.files import WEIGHTS_NAME, AdapterFiles, open_folder, read_folder
from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.manifest import manifest_of
from peftc.checkpoint.tensor_file import read_header
from peftc.errors import CheckpointError, PeftcError
from peftc.graph.ops import shapes as module_ops
from peftc.graph.rows import POINTWISE
from peftc.graph.sites import Site, WeightSite
from peftc.registry import find_rule, ops_of, rules_of
from peftc.rule import Bound, Param, Rule, Shapes
from peftc.specs import AdapterSpec
from peftc.stream.bases import compare_base

WHOLE = "config and tensors are what was saved"
# How many dimensions the kernel of an op's weight has, where it has one.
_KERNELS = {op: dims for dims, op in enumerate(POINTWISE, 1)}


@dataclass(frozen=True)
class InspectedSite:
    """What is at one site. `columns`: what the method's rules show in plans (a rank, an alpha). `norm` of the change, its
    `effective_rank` and its singular values: None where the change is no product, or the files don't tell.
    """

    name: str
    op: str | None
    tensors: Shapes
    parameters: int
    columns: Mapping[str, Any]
    norm: float | None = None
    effective_rank: float | None = None
    spectrum: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Inspected:
    """An adapter's files. `damage`: what is wrong with them. `fit`: what comparing the base's weights with those that it
    was saved with has given, and `misfit` why they are not the same model; None where nothing was compared. `others`:
    tensors that are at no site of the method.
    """

    folder: str
    method: str
    base: str | None
    task: str | None
    integrity: str
    damage: str | None
    fit: str | None
    misfit: str | None
    parameters: int
    bytes: int
    sites: tuple[InspectedSite, ...]
    others: Shapes


@dataclass(frozen=True)
class _Fit:
    """A rule whose parameters at `site` have the shapes that a file has there."""

    site: WeightSite
    rule: Rule[Any]
    params: Mapping[str, Param]
    constants: Mapping[str, Any]


def inspected(folder: Path, base: nn.Module | None, weights: Path | None) -> Inspected:
    """What the adapter in `folder` is. `base`: its model, on any device, which tells what shapes leave open; `weights`: the
    folder of its checkpoint, of which a few values are compared.

    Raises SpecError, CheckpointError if there is none that can be read at all.
    """
    files, file, integrity, damage = _opened(folder)
    spec = files.spec
    try:
        fit, misfit = (None, None) if weights is None or damage is not None else _fit_of(weights, files, file, base)
        known = {} if base is None else plan(base, spec).sites
        groups, others = _by_site(spec, {key: entry.shape for key, entry in file.header.entries.items()})
        sites = tuple(_site(spec, name, keys, file, known.get(name)) for name, keys in groups.items())
        entries = file.header.entries.values()
        return Inspected(
            folder=str(folder),
            method=str(spec.peft_type),
            base=spec.base_model_name_or_path,
            task=spec.task_type,
            integrity=integrity,
            damage=damage,
            fit=fit,
            misfit=misfit,
            parameters=sum(prod(entry.shape) for entry in entries),
            bytes=sum(entry.nbytes for entry in entries),
            sites=sites,
            others=others,
        )
    finally:
        file.close()


def require_whole(folder: Path) -> None:
    """Raise CheckpointError if the files of an adapter are not what was saved, or don't say what that was."""
    read_folder(folder, config=None, verify="files", allow_pickle=False, encoder=True)
    file = folder / WEIGHTS_NAME
    if manifest_of(read_header(file).metadata, file) is None:
        raise CheckpointError(
            f"{folder}: has no manifest to compare with (PEFT writes none). peftc convert {folder} NEW --base MODEL"
            " --form peft writes the same with one"
        )


def _opened(folder: Path) -> tuple[AdapterFiles, FileTensors, str, str | None]:
    """The files, the one with tensors open, what its manifest says, and what is wrong."""
    damage = None
    try:
        files, file = open_folder(folder, "all")
    except CheckpointError as error:
        files, file = open_folder(folder, "nothing")  # What can't be read even so is an error.
        damage = str(error)
    try:
        has = damage is None and manifest_of(file.header.metadata, file.file) is not None
    except BaseException:
        file.close()
        raise
    integrity = WHOLE if has else "not known: there is no manifest (PEFT writes none)"
    return files, file, "damaged" if damage is not None else integrity, damage


def _fit_of(
    weights: Path, files: AdapterFiles, file: FileTensors, base: nn.Module | None
) -> tuple[str | None, str | None]:
    """What there is to say of a base's weights, and why they are not those of the adapter's base."""
    if files.base is None:
        return "not known: the files have no fingerprint of their base (PEFT writes none)", None
    try:
        caution = compare_base(weights, files, file, base)
    except PeftcError as error:
        return "another model", str(error)
    return caution or "the weights it was saved with, as far as they were sampled", None


def _by_site(spec: AdapterSpec, shapes: Shapes) -> tuple[dict[str, dict[str, str]], Shapes]:
    """The keys of the file, by site and by what they are called there; and the shapes of the others."""
    firsts = {first for rule in rules_of(spec) for first in rule.keys}
    groups: dict[str, dict[str, str]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        parts = key.removeprefix(spec.key_prefix).split(".")
        at = next((at for at, part in enumerate(parts) if part in firsts), None)
        if at is None:
            others[key] = shape
        else:
            groups.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = key
    return groups, others


def _site(
    spec: AdapterSpec, name: str, keys: Mapping[str, str], file: FileTensors, known: Site | None
) -> InspectedSite:
    shapes = {own: file.header.entries[key].shape for own, key in keys.items()}
    sites = iter([known]) if isinstance(known, WeightSite) else _candidates(spec, name, shapes)
    fits = [fit for site in sites if (fit := _fit(spec, site, shapes)) is not None]
    shown = [_columns(fit) for fit in fits]
    first = shown[0] if shown else {}
    columns = {column: value for column, value in first.items() if all(one[column] == value for one in shown)}
    ops = {fit.site.op for fit in fits}
    spectrum = _spectrum(fits[0], keys, file) if len(fits) == 1 else None
    measures = (None, None, None) if spectrum is None else (*_measures(spectrum), tuple(spectrum.tolist()))
    count = sum(map(prod, shapes.values()))
    return InspectedSite(name, ops.pop() if len(ops) == 1 else None, shapes, count, columns, *measures)


def _candidates(spec: AdapterSpec, name: str, shapes: Shapes) -> Iterator[WeightSite]:
    """Sites that tensors of these shapes may be at: the lengths of the tensors are all that is known of its weight, and
    one more, which fits if they don't depend on it.
    """
    lengths = {length for shape in shapes.values() for length in shape}
    lengths.add(2 * lcm(*lengths))
    kernels = {(), *(shape[2:] for shape in shapes.values())}
    modules = {op for op, _ in module_ops()}
    for op, out, inner, kernel in product(ops_of(spec), lengths, lengths, kernels):
        if op in modules and len(kernel) == _KERNELS.get(op, 0):
            yield WeightSite(name, op, "", in_features=inner, out_features=out, kernel_size=kernel)


def _fit(spec: AdapterSpec, site: WeightSite, shapes: Shapes) -> _Fit | None:
    """The rule for `spec` at `site`, if what it declares there is what the file has."""
    rule = find_rule(spec, site)
    if rule is None:
        return None
    try:
        params, constants = rule.params(spec, site), rule.constants(spec, site)
    except Exception:  # Whatever a site that can't be makes a rule raise.
        return None
    named = {param.key or name: param.shape for name, param in params.items()}
    wrong = any(named.get(key) != shape for key, shape in shapes.items())
    return None if wrong else _Fit(site, rule, params, constants)


def _columns(fit: _Fit) -> dict[str, Any]:
    return {column: fit.constants.get(constant) for column, constant in fit.rule.columns.items()}


def _spectrum(fit: _Fit, keys: Mapping[str, str], file: FileTensors) -> Tensor | None:
    """The singular values of the change at a site, if that is a product of what the file holds of it."""
    own = fit.rule.additive and fit.rule.offers("factors") and not fit.rule.offers("shared")
    names = {name: keys.get(param.key or name) for name, param in fit.params.items()}
    if not own or None in names.values():
        return None
    values = {n: file[key].to(torch.float64) / fit.params[n].stored for n, key in names.items() if key is not None}
    made = fit.rule.factors(Bound({**values, **fit.constants}))
    if made is None or made.up.flatten(1).shape[1] != made.down.shape[0]:
        return None
    return _singular_values(made.up.flatten(1), made.down.flatten(1)) * abs(float(made.scale))


def _measures(spectrum: Tensor) -> tuple[float, float]:
    """The norm and the effective rank of what has these singular values."""
    total = float(spectrum.sum())
    shares = spectrum[spectrum > 0] / total if total > 0 else spectrum[:0]
    effective = float(torch.exp(-(shares * shares.log()).sum())) if total > 0 else 0.0
    return float(torch.linalg.vector_norm(spectrum)), effective


def _singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Those of up @ down, which is never made: it may be large."""
    return torch.linalg.svdvals(torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT)
