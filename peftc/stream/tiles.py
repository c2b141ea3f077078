"""New bytes of a checkpoint's tensors, in pieces that fit a cache, and how near arithmetic gets to the old ones."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.checkpoint.lazy import FileTensors, outline
from peftc.checkpoint.tensor_file import Entry
from peftc.errors import MergeError
from peftc.graph.sites import WeightSite, parameter_name
from peftc.merge.fold import fold_bias, fold_of, tiles
from peftc.merge.undo import owner_of
from peftc.stream.names import Fusion
from peftc.stream.work import Change, Work, file_of, stored_name, weight_site

# What reads rows of the merged tensors, where they are there already.
Merged = Callable[[str, slice], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a tensor of a merged checkpoint comes about, in `parts` of its first dimension that don't need each other.

    `make` gives the new rows of parts that adjoin and, for each of these, an estimate of the old ones from them, if that
    is asked for and can be said.
    """

    parts: Sequence[slice]
    make: Callable[[Sequence[slice]], tuple[Tensor, Sequence[Tensor | None]]]


def recipe(work: Work, change: Change, stored: str, undo: bool, merged: Merged | None) -> Recipe:
    """The recipe of the tensor `stored`, which alone is what `change` is about.

    `merged`: take new rows from there, and only estimate the old ones.
    """
    file = file_of(work, stored)
    start = _start(work, change, file, stored)
    if change.is_bias or not change.edits:
        return _taken(work, change, stored, start, merged)
    site, like = weight_site(work, change.edits[0]), outline_of(work, change, stored)
    known = undo and change.start is None and like.itemsize > 1 and site.fqn not in work.following
    if merged is not None and not known:
        kept = [part for part, _ in tiles(site, like, change.edits, work.options.tile)]
        return Recipe(kept, lambda parts: (merged(stored, together(parts)), [None] * len(parts)))
    fold = fold_of(site, change.edits, like, work.value, work.value if known else None, work.options.tile)
    axes = {part.start: axis for part, axis in fold.parts}

    def make(parts: Sequence[slice]) -> tuple[Tensor, Sequence[Tensor | None]]:
        everything = together(parts)
        new = start(everything) if merged is None else merged(stored, everything)
        estimates: list[Tensor | None] = []
        for part in parts:
            tile, axis = new[part.start - everything.start : part.stop - everything.start], axes[part.start]
            if merged is None:
                tile.copy_(_scaled(fold.new(part, axis, tile), change.scale))
            estimates.append(fold.estimate(part, axis, _scaled(tile, 1 / change.scale)) if known else None)
        return new, estimates

    return Recipe([part for part, _ in fold.parts], make)


def outline_of(work: Work, change: Change, stored: str) -> Tensor:
    """What a change makes of the tensor `stored`, on the meta device: as large as what the adapter brings for it."""
    like = _like(file_of(work, stored).header.entries[stored])
    if change.start is None:
        return like
    adapter, key = change.start
    return like.new_empty(work.sources[adapter].tensors.header.entries[key].shape)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else (tensor.double() * scale).to(tensor.dtype)


def together(parts: Sequence[slice]) -> slice:
    """The slice of parts that adjoin."""
    return slice(parts[0].start, parts[-1].stop)


def _start(work: Work, change: Change, file: FileTensors, stored: str) -> Callable[[slice], Tensor]:
    """The rows that a change starts from: the checkpoint's, or those that an adapter brings, in the same dtype."""
    dtype = _like(file.header.entries[stored]).dtype
    if change.start is None:
        return lambda part: file.rows(stored, part)
    adapter, key = change.start
    return lambda part: work.sources[adapter].tensors.rows(key, part).to(dtype)


def _taken(work: Work, change: Change, stored: str, start: Callable[[slice], Tensor], merged: Merged | None) -> Recipe:
    """Rows of a tensor that an adapter brings; or a bias, with what is folded into it."""
    shape = tuple(outline_of(work, change, stored).shape)
    length = shape[0] if shape else 1
    size = length if change.is_bias else max(1, work.options.tile * length // max(1, torch.Size(shape).numel()))

    def make(parts: Sequence[slice]) -> tuple[Tensor, Sequence[Tensor | None]]:
        unknown = [None] * len(parts)
        if merged is not None:
            return merged(stored, together(parts)), unknown
        new = start(together(parts))
        if change.is_bias:
            site = weight_site(work, change.edits[0])
            folded = fold_bias(site, change.edits, new, work.value, lambda: _weight(work, site))
            new = new if folded is None else folded
        return _scaled(new, change.scale), unknown

    return Recipe([slice(at, min(length, at + size)) for at in range(0, length, size)], make)


def _weight(work: Work, site: WeightSite) -> Tensor:
    """The whole weight of a site, which its bias follows from."""
    parameter = parameter_name(*owner_of(site))
    stored = stored_name(work, parameter)
    if stored is None:
        raise MergeError(
            f"{site.bias}: what is folded into it follows from {parameter}, which the checkpoint holds in another form."
            " Merge in memory (merge_and_unload)."
        )
    file = file_of(work, stored)
    return file.rows(stored, slice(0, file.header.entries[stored].shape[0]))


def fused_recipes(
    work: Work, fusion: Fusion, changes: Sequence[Change], undo: bool, merged: Merged | None
) -> dict[str, Recipe]:
    """The recipes of tensors that are parameters together: computed once, whole, and handed out part by part."""
    lock, ready = threading.Lock(), dict[str, tuple[Tensor, Tensor | None]]()
    whole = {stored: slice(0, file_of(work, stored).header.entries[stored].shape[0]) for stored in fusion.parts}

    def make(stored: str) -> tuple[Tensor, Sequence[Tensor | None]]:
        with lock:
            if stored not in ready:
                ready.update(_fused(work, fusion, changes, undo, whole, merged))
            new, estimate = ready.pop(stored)
            return new, [estimate]

    return {stored: Recipe([whole[stored]], lambda _, stored=stored: make(stored)) for stored in fusion.parts}


def _fused(
    work: Work,
    fusion: Fusion,
    changes: Sequence[Change],
    undo: bool,
    whole: Mapping[str, slice],
    merged: Merged | None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    read: Merged = merged or (lambda stored, part: file_of(work, stored).rows(stored, part))
    stored = {name: read(name, part) for name, part in whole.items()}
    new = fusion.fuse(stored, work.program.base)
    old = dict(new)
    for change in changes:
        value = new[change.parameter]
        if change.start is not None:
            if merged is None:
                adapter, key = change.start
                new[change.parameter] = work.sources[adapter].tensors[key].to(value.dtype)
            old[change.parameter] = new[change.parameter]
            continue
        everything = slice(0, value.shape[0])
        fold = fold_of(
            weight_site(work, change.edits[0]), change.edits, value, work.value, work.value if undo else None
        )
        if merged is None:
            new[change.parameter] = value = fold.new(everything, "", value)
        if undo:
            old[change.parameter] = fold.estimate(everything, "", value)
    made = fusion.split(new, work.program.base) if merged is None else stored
    estimate = fusion.split(old, work.program.base) if undo else None
    return {name: (made[name], None if estimate is None else estimate[name]) for name in whole}


def _like(entry: Entry) -> Tensor:
    return outline({entry.name: entry})[entry.name]
