"""Folding: the weights with which the bare sites do what the adapted ones do.

A weight is computed in float64 (float32 for half precision, and on devices without float64) over all adapters of its
site and rounded once; a large one tile by tile, where the rules allow it.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftc.errors import MergeError, RuleError
from peftc.graph.sites import WeightSite, canonical, parameter_name
from peftc.memory import in_huge_pages
from peftc.merge.threads import side_by_side
from peftc.merge.undo_log import RunningSum
from peftc.plan import Edit, PlannedParam
from peftc.rewrite.parts import Adapter, Part
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import is_sharded, own, part_of, shard_as, shard_like, whole
from peftc.rule import Bound, Factors, Rule

# What gives the tensor of a parameter.
Value = Callable[[Edit, PlannedParam], Tensor]
# Elements of a tile: in float64 it stays in a processor's cache.
TILE = 2**17


@dataclass(frozen=True)
class Step:
    """One edit, ready to fold: its rule and constants, its tensors by name and the axes these run along.

    `product`: up (out, r), down (r, in) and s, if all that it does to a matrix is to add s · (up · down).
    """

    edit: Edit
    values: Mapping[str, Tensor]
    product: Factors | None = None

    @property
    def rule(self) -> Rule[Any]:
        """The edit's."""
        return self.edit.rule

    @property
    def axes(self) -> Mapping[str, str | None]:
        """By name of a parameter, along which axes of the canonical weight it runs."""
        return {param.name: param.axes for param in self.edit.params}

    def at(self, axis: str, start: int, stop: int, weight: Tensor, bias: Tensor | None = None) -> Bound:
        """What the rule gets as `p` for the part from `start` to `stop` of the weight along `axis`; `weight` is that part
        as it is before this edit.
        """
        lazy: dict[str, Callable[[], Any]] = {"weight": lambda: weight, "bias": lambda: bias}
        return Bound({**self.cut(axis, start, stop).values, **self.edit.constants}, lazy)

    def cut(self, axis: str, start: int, stop: int) -> "Step":
        """The same for the part from `start` to `stop` of the weight along `axis`."""
        axes = self.axes
        cut = {name: _cut(value, axes[name] or "", axis, start, stop) for name, value in self.values.items()}
        return replace(self, values=cut, product=self._product(axis, start, stop))

    def _product(self, axis: str, start: int, stop: int) -> Factors | None:
        if self.product is None:
            return None
        up, down, scale = self.product
        return Factors(_cut(up, "or", axis, start, stop), _cut(down, "ri", axis, start, stop), scale)

    def onto(self, weight: Tensor, axis: str, start: int, stop: int) -> Tensor:
        """The part from `start` to `stop` along `axis` as this edit makes it of `weight`; that may be overwritten."""
        product = self._product(axis, start, stop)
        if product is None or weight.dim() != 2:
            return self.rule.weight(weight, self.at(axis, start, stop, weight))
        return weight.addmm_(product.up * product.scale, product.down)

    def off(self, weight: Tensor, axis: str, start: int, stop: int) -> Tensor:
        """An estimate of what `onto` made `weight` of, by exact products; that may be overwritten."""
        product = self._product(axis, start, stop)
        if product is None or weight.dim() != 2:
            return self.rule.unfold(weight, self.at(axis, start, stop, weight))
        delta = torch.mm(product.up, product.down, out=_scratch("delta", weight, weight.dtype))
        # As 0 + s · delta: what a rule adds to zeros has no negative ones.
        return weight.sub_(torch.add(weight.new_zeros(()), delta, alpha=product.scale, out=delta))


@dataclass(frozen=True)
class Folded:
    """A new value of the tensor `leaf` of module `owner`. `same`: the parameter, tied to it, that has got it. `sums`: the
    checksums of the old value and of the new one, where they were taken on the way.
    """

    owner: str
    leaf: str
    value: Tensor
    same: str | None = None
    sums: tuple[int, int] | None = None


def edits_by_site(program: Program, names: Sequence[str]) -> dict[str, list[Edit]]:
    """The edits of the adapters `names` by site, in load order."""
    groups: dict[str, list[Edit]] = {}
    for name in program.plan.adapters:
        for edit in program.adapters[name].edits if name in names else ():
            groups.setdefault(edit.site, []).append(edit)
    return groups


def value_in(adapters: Mapping[str, Adapter]) -> Value:
    """The live tensors of adapters, for `steps_of`."""
    return lambda edit, param: whole(adapters[edit.adapter].tensor(edit, param.key))


def steps_of(edits: Sequence[Edit], dtype: torch.dtype, value: Value) -> list[Step]:
    """The steps of a site's `edits` in `dtype`; `value` gives the tensor of a parameter. Integers stay what they are."""
    found: list[Step] = []
    for edit in edits:
        values = {param.name: _as(value(edit, param).detach(), dtype) for param in edit.params}
        found.append(Step(edit, values, _product(edit, values)))
    return found


def _product(edit: Edit, values: Mapping[str, Tensor]) -> Factors | None:
    """Those of an edit that adds the product of two matrices, else None."""
    factors = edit.rule.factors(Bound({**values, **edit.constants})) if edit.rule.additive else None
    return None if factors is None or factors.up.dim() != 2 or factors.down.dim() != 2 else factors


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def tiles(
    site: WeightSite, weight: Tensor, edits: Sequence[Edit], size: int | None = None
) -> Iterator[tuple[slice, str]]:
    """Slices of about `size` elements (TILE) of the first dimension of a stored weight, and which axis of the canonical one
    that is ("": it is whole). The bits of a product depend on its shape, so whoever folds takes the same slices.
    """
    size = TILE if size is None else size
    length, axis = weight.shape[0], "i" if site.layout == "in_out" else "o"
    whole = any(axis not in edit.rule.local or any(p.axes is None for p in edit.params) for edit in edits)
    if site.experts is not None or whole:
        yield slice(0, length), ""
        return
    rows = max(1, size * length // max(1, weight.numel()))
    for start in range(0, length, rows):
        yield slice(start, min(length, start + rows)), axis


def fold_tile(
    site: WeightSite, tile: Tensor, steps: Sequence[Step], axis: str, part: slice, out: Tensor | None = None
) -> Tensor:
    """The new value of `tile`, the `part` of a stored weight, rounded to its dtype; written to `out` if there is one."""
    new = canonical(_wide_copy(tile, fold_dtype(tile)), site)
    for step in steps:
        new = step.onto(new, axis, part.start, part.stop)
    stored = canonical(new, site)
    if stored.shape != tile.shape:
        raise RuleError(
            f"rule {steps[-1].rule.name!r}: folding into {site.weight} gives shape {tuple(stored.shape)}, not"
            f" {tuple(tile.shape)}"
        )
    return stored.to(tile.dtype) if out is None else out.copy_(stored)


# By thread, memory for a tile in a wider dtype: to get it anew for each takes longer than the arithmetic.
_SCRATCH = threading.local()


def _wide_copy(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `tile` in `dtype`, good until this thread makes the next; in its own dtype, where what is made of it is not
    cast back and so copied, one for good.
    """
    return tile.clone() if tile.dtype is dtype else _scratch("tile", tile, dtype).copy_(tile)


def _scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of `like`, of any values, good until this thread asks for it by that name again."""
    if like.device.type != "cpu" or like.numel() > 2 * TILE:
        return torch.empty_like(like, dtype=dtype)
    key = f"{name}, {dtype}"
    memory: Tensor | None = getattr(_SCRATCH, key, None)
    if memory is None:
        memory = torch.empty(2 * TILE, dtype=dtype)
        setattr(_SCRATCH, key, memory)
    return memory[: like.numel()].view(like.shape)


@dataclass(frozen=True)
class Fold:
    """The edits of a site, ready to be folded into its weight wherever that is: in memory or on disk, `parts` at a time.

    `parts`: slices of the first dimension of the stored weight, and the axis of the canonical one that they cut; they
    don't need each other. `steps` make the new value of a part, `back` an estimate of the old one from it (if asked for).
    """

    site: WeightSite
    edits: Sequence[Edit]
    steps: Sequence[Step]
    back: Sequence[Step]
    parts: tuple[tuple[slice, str], ...]

    def new(self, part: slice, axis: str, tile: Tensor, out: Tensor | None = None) -> Tensor:
        """The new value of `tile`, the old one of `part`, in `out` if given. Raises MergeError if it is not finite."""
        new = fold_tile(self.site, tile, self.steps, axis, part, out)
        require_finite(new, str(self.site.weight), self.edits)
        return new

    def estimate(self, part: slice, axis: str, tile: Tensor) -> Tensor:
        """An estimate of the old value of `part` from `tile`, its new one."""
        return unfold_tile(self.site, tile, self.back, axis, part)


def fold_of(
    site: WeightSite,
    edits: Sequence[Edit],
    like: Tensor,
    value: Value,
    back: Value | None = None,
    size: int | None = None,
) -> Fold:
    """The fold of `edits` into a weight of the shape and dtype of `like`, in parts of about `size` elements.

    `value` gives the adapters' tensors; `back` those by which the way back is estimated.
    """
    steps = steps_of(edits, fold_dtype(like), value)
    return Fold(site, edits, steps, steps_back(edits, back) if back else [], tuple(tiles(site, like, edits, size)))


def fold_weight(
    adapters: Mapping[str, Adapter],
    site: WeightSite,
    edits: Sequence[Edit],
    weight: Tensor,
    sums: bool,
) -> tuple[Tensor, tuple[int, int] | None]:
    """The folded value of the weight of `site`, sharded as that is; with `sums`, the checksums of the old one and the new
    one, if they are easily had. Raises MergeError if it is not finite.

    Of a shard, if the rules are local along the axes that are cut; else of the whole, one weight at a time.
    """
    steps = steps_of(edits, fold_dtype(weight), value_in(adapters))
    if not is_sharded(weight):
        return _folded(site, edits, weight, steps, sums)
    cut = _cut_as(site, steps, weight)
    if cut is not None:
        return shard_like(_folded(site, edits, own(weight), cut)[0], weight), None
    return shard_as(_folded(site, edits, whole(weight), steps)[0], weight), None


def _cut_as(site: WeightSite, steps: Sequence[Step], weight: Tensor) -> list[Step] | None:
    """`steps` for this process's shard of `weight` alone; None if a rule needs more than that to fold it."""
    part = part_of(weight)
    if part is None or site.experts is not None:
        return None
    stored, found = "io" if site.layout == "in_out" else "oi", list(steps)
    for dim, one in enumerate(part):
        if one == slice(0, weight.shape[dim]):
            continue
        axis = stored[dim] if dim < len(stored) else ""
        if any(not axis or axis not in step.rule.local or None in step.axes.values() for step in steps):
            return None
        found = [step.cut(axis, one.start, one.stop) for step in found]
    return found


def _folded(
    site: WeightSite, edits: Sequence[Edit], weight: Tensor, steps: Sequence[Step], sums: bool = False
) -> tuple[Tensor, tuple[int, int] | None]:
    """What `steps` make of a weight, tile by tile, and the `sums` of both, taken while a tile is in a processor's cache."""
    fold, new = Fold(site, edits, steps, [], tuple(tiles(site, weight, edits))), in_huge_pages(torch.empty_like(weight))
    old_sum, new_sum = RunningSum(), RunningSum()
    sums = sums and type(weight) is Tensor and weight.is_contiguous() and not weight.is_meta

    def write(part: slice, axis: str) -> slice:
        fold.new(part, axis, weight[part], new[part])
        return part

    with side_by_side(weight.device) as run:
        for part in run(partial(write, *part) for part in fold.parts):
            if sums:
                old_sum.add(weight[part])
                new_sum.add(new[part])
    return new, (old_sum.value, new_sum.value) if sums else None


def fold_bias(
    site: WeightSite, edits: Sequence[Edit], bias: Tensor, value: Value, weight: Callable[[], Tensor]
) -> Tensor | None:
    """The folded bias of `site`, or None if no edit changes it; `weight` gives the stored weight, to rules that ask for it.

    Raises MergeError if it is not finite.
    """
    start = new = bias.to(fold_dtype(bias), copy=True)
    steps = steps_of(edits, start.dtype, value)
    for number, step in enumerate(steps):
        lazy = {"bias": lambda b=new: b, "weight": partial(_before, site, weight, steps[:number])}
        new = step.rule.bias(new, Bound({**step.values, **step.edit.constants}, lazy))
    if new is start:
        return None
    require_finite(new.to(bias.dtype), str(site.bias), edits)
    return new.to(bias.dtype)


def _before(site: WeightSite, weight: Callable[[], Tensor], steps: Sequence[Step]) -> Tensor:
    """The canonical weight after `steps`, which come before another one; not rounded."""
    stored = weight()
    new = canonical(stored.to(fold_dtype(stored)), site)
    for step in steps:
        new = step.rule.weight(new, step.at("", 0, 0, new))
    return new


def fold_copies(part: Part) -> list[Folded]:
    """The trained copy's own tensors, in the place of the base module's. A buffer may hold an infinite mask."""
    edit = part.edit
    assert edit.whole, "others have a fold"
    found: list[Folded] = []
    for param in edit.params:
        value = whole(part.tensor(param.key)).detach().clone()
        path, _, leaf = param.key.rpartition(".")
        if param.trainable:
            require_finite(value, parameter_name(edit.site, param.key), [edit])
        found.append(Folded(parameter_name(edit.site, path) if path else edit.site, leaf, value))
    return found


def unfold_tile(site: WeightSite, tile: Tensor, steps: Sequence[Step], axis: str, part: slice) -> Tensor:
    """An estimate of what `fold_tile` made `tile` from: the same bits on any device, with any number of threads."""
    old = canonical(_wide_copy(tile, torch.float64), site)
    for step in reversed(steps):
        old = step.off(old, axis, part.start, part.stop)
    return canonical(old, site).to(tile.dtype)


def steps_back(edits: Sequence[Edit], value: Value) -> list[Step]:
    """The steps by which `unfold_tile` estimates, whatever the order in which products are summed."""
    steps = steps_of(edits, torch.float64, lambda edit, param: exact(value(edit, param), param))
    return [step if _is_exact(step) else replace(step, product=None) for step in steps]


def _is_exact(step: Step) -> bool:
    """Whether what it adds is a product of two parameters, which are such, and a number."""
    if step.product is None or not step.rule.repeats or type(step.rule).unfold is not Rule.unfold:
        return False
    up, down, scale = step.product
    factors = [step.values[param.name] for param in step.edit.params if param.use != "vector"]
    return all(any(one is own for own in factors) for one in (up, down)) and isinstance(scale, float)


def exact(value: Tensor, param: PlannedParam) -> Tensor:
    """`value` in float64; a factor of matrix products on a grid so coarse that these, and their sums, are exact.

    So every order of summation gives the same bits. With n terms of b-bit factors that needs 2b + log2 n ≤ 53.
    """
    if not value.is_floating_point():
        return value
    value = value.double()
    if param.use == "vector" or not value.numel():
        return value
    axes = param.axes or ""
    terms = math.prod(size for size, axis in zip(param.shape, axes, strict=False) if axis not in "oi")
    bits = (53 - (terms - 1).bit_length()) // 2 if axes else 16
    _, exponent = math.frexp(float(value.abs().amax()))
    unit = math.ldexp(1.0, max(exponent - bits, -1000))  # A power of two: scaling by it rounds nothing.
    return torch.round(value / unit) * unit


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a weight is folded in: wide enough that one rounding remains."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half or weight.device.type == "mps" else torch.float64


def require_finite(value: Tensor, name: str, edits: Sequence[Edit]) -> None:
    """Raise MergeError if a folded value is not finite."""
    if not value.is_meta and not is_finite(value):
        adapters = ", ".join(repr(edit.adapter) for edit in edits)
        raise MergeError(
            f"{name}: folding adapter {adapters} gives NaN or Inf (a broken adapter, or a value over the range of"
            f" {value.dtype}); nothing was merged"
        )


def is_finite(value: Tensor) -> bool:
    """Whether all of `value` is finite."""
    value = value.detach()
    if value.itemsize == 1:
        value = value.float()  # float8 has no arithmetic.
    # A sum of finite values that overflows only costs the second look; the first is twenty times as fast.
    return math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())


def _cut(value: Tensor, axes: str, axis: str, start: int, stop: int) -> Tensor:
    return value.narrow(axes.index(axis), start, stop - start) if axis and axis in axes else value
