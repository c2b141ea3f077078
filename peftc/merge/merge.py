"""The reversible merge pass: every active adapter goes from the graphs into the weights, and back bit for bit.

Nothing is half merged. Values that get a tensor of their own are all computed before the first is exchanged; those that
are folded in place (`undo="residual"`) are restored from their logs if anything fails.
"""

import logging
from collections.abc import Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, MergeError
from peftc.graph.finding import parameter_at
from peftc.graph.sites import WeightSite, parameter_name
from peftc.merge import ties
from peftc.merge.fold import Folded, edits_by_site, fold_bias, fold_copies, fold_weight, value_in
from peftc.merge.ownership import require_own
from peftc.merge.undo import fold_in_place, owner_of, require_intact, restore, slots_of, tensor_of
from peftc.merge.undo_log import checksum, require_zstandard
from peftc.plan import Edit, Plan
from peftc.progress import Tick, bar
from peftc.rewrite.parts import Adapter
from peftc.rewrite.processes import require_unflattened
from peftc.rewrite.program import Merged, Program, Replaced, require_idle
from peftc.rewrite.sharding import agreed, is_sharded, is_shared, managed, own, put, reshard, shard_as, whole
from peftc.rewrite.switch import emit, train

Undo = Literal["keep", "residual", "none"]
_LOG = logging.getLogger(__name__)


def merge(program: Program, names: Sequence[str], untie: bool, undo: str, progress: bool = False) -> None:
    """Fold the active adapters `names` into the base weights. `progress`: show how many sites are done.

    Raises MergeError, with nothing changed, if an edit has no fold, a result is not finite, a weight is tied and `untie`
    is false, an unmerged adapter was loaded before at the same site and does not commute, or `undo` is not possible.
    """
    _require_state(program, names, undo)
    groups = edits_by_site(program, names)
    require_mergeable(program, names, groups)
    inside = _in_place(program, groups) if undo == "residual" else {}
    reshard(program.base)
    begin = perf_counter()
    with _quiet(program.base), bar("merge", len(groups), "sites", progress) as tick:
        going = ties.moving(program, groups)
        moved = ties.together(program.plan, going)
        outside = _all_folded(program, groups, inside, going, undo != "none", tick)
        if untie:
            outside = ties.untied(program, outside, moved)
        else:
            ties.require_untied(program, [(item.owner, item.leaf) for item in outside], moved)
        # The rest would be too much to keep twice; what fails here is undone.
        program.merge.names = tuple(names)
        program.merge.paused = tuple(name for name in program.learning if name in names)
        try:
            emit(program)
            for site in inside:
                fold_in_place(program, inside[site], groups[site])
                tick()
            held = managed(program.base)
            for item in outside:
                _exchange(program, item, undo != "none", held, moved)
            train(program, [name for name in program.learning if name not in names])
        except BaseException:
            restore(program, check=False)
            raise
    _LOG.info("merged %s: %d sites, undo=%r, %.2f s", ", ".join(names), len(groups), undo, perf_counter() - begin)


def unmerge(program: Program, check: bool = True, progress: bool = False) -> None:
    """Put the original tensors back, and splice the adapters in again. Raises MergeError; nothing is changed then.

    `check`: compare every tensor with the checksum taken when it was merged, before and after.
    """
    require_idle(program)
    if not program.merged:
        raise MergeError("no adapter is merged")
    reshard(program.base)
    replaced = program.merge.replaced
    gone = [parameter_name(one.owner, one.leaf) for one in replaced if one.original is None and one.merged is None]
    if gone:
        raise MergeError(f"{', '.join(program.merged)} merged with undo='none': the original {gone[0]}, … is gone")
    for item in replaced:
        require_intact(program, item, check)
    names, count = program.merged, len(replaced)
    begin = perf_counter()
    with _quiet(program.base), bar("unmerge", count, "tensors", progress) as tick:
        restore(program, check, tick)
    _LOG.info("unmerged %s: %d tensors, %.2f s", ", ".join(names), count, perf_counter() - begin)


def forget(program: Program) -> None:
    """Make the merge final: the folded weights become the base's, and the merged adapters are done with."""
    program.merge = Merged()


@contextmanager
def _quiet(base: nn.Module) -> Generator[None]:
    """The caller's autocast would round the fold, and tensors made in inference mode can't be trained with."""
    device = next((p.device.type for p in base.parameters() if not p.is_meta), "cpu")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _require_state(program: Program, names: Sequence[str], undo: str) -> None:
    if undo not in get_args(Undo):
        raise MergeError(f"undo={undo!r}: valid are 'keep', 'residual' and 'none'")
    require_idle(program)
    if undo == "residual":
        require_zstandard()
    if program.merged:
        raise MergeError(f"{', '.join(program.merged)} merged already; call unmerge_adapter() first")
    if not program.enabled:
        raise MergeError("adapters are disabled; merge outside of disable_adapter()")
    for name in names:
        require_unflattened(
            program.adapters[name],
            MergeError,
            "Save the adapter and merge on one process, or on disk (merge_checkpoint).",
        )
        if name not in program.active:
            raise AdapterError(
                f"adapter {name!r} is not active ({', '.join(program.active) or 'none is'}); set it first"
            )


def require_mergeable(program: Program, names: Sequence[str], groups: Mapping[str, Sequence[Edit]]) -> None:
    """Raise MergeError if an edit of `groups`, by site, can't be folded, or not before those that stay active."""
    for fqn, edits in groups.items():
        for edit in edits:
            if edit.unmergeable:
                raise MergeError(f"{fqn or 'the model'}: adapter {edit.adapter!r} can't be merged: {edit.unmergeable}")
        _require_order(program, names, fqn, edits)


def _require_order(program: Program, names: Sequence[str], fqn: str, edits: Sequence[Edit]) -> None:
    """An adapter that stays unmerged may come before a merged one only if both are additive."""
    staying = program.edits_at(fqn, [name for name in program.active if name not in names])
    order = list(program.plan.adapters)
    for edit in edits:
        for other in staying:
            earlier = order.index(other.adapter) < order.index(edit.adapter)
            if earlier and not (edit.rule.additive and other.rule.additive):
                raise MergeError(
                    f"{fqn}: {edit.adapter!r} was loaded after {other.adapter!r}, which would stay unmerged, and the two"
                    " do not commute. Merge both, or deactivate one."
                )


def _all_folded(
    program: Program,
    groups: Mapping[str, Sequence[Edit]],
    inside: Mapping[str, WeightSite],
    going: Mapping[str, str],
    keep: bool,
    tick: Tick,
) -> list[Folded]:
    """The new values of all that is not folded in place, with checksums if old ones are to be kept; those of sites that
    change with another one come last.

    Raises MergeError if one is not finite, in whatever process.

    Each folds its own shards, and all gather adapters: who finds that one is broken goes on until all can know.
    """
    found: list[Folded] = []
    error: MergeError | None = None
    for site, edits in groups.items():
        try:
            found += (
                _fold(program, site, edits, site in inside, keep)
                if site not in going
                else _beside(program.adapters, edits)
            )
            tick(site not in inside)
        except MergeError as broken:
            error = error or broken
            if not is_shared(program.base):
                break
    if not agreed(program.base, error):
        raise error or MergeError(
            "another process found values that can't be merged, and says which; nothing was merged"
        )
    return found + _ends(program.plan, going, found)


def _beside(adapters: Mapping[str, Adapter], edits: Sequence[Edit]) -> list[Folded]:
    """What a copy has beside the weight that it has in common with another."""
    own = fold_copies(adapters[edits[-1].adapter].part(edits[-1])) if edits[-1].whole else []
    return [item for item in own if (item.owner, item.leaf) != (edits[-1].site, "weight")]


def _ends(plan: Plan, going: Mapping[str, str], found: Sequence[Folded]) -> list[Folded]:
    """The weights of sites that change with another one: they get the very tensor that is `found` for that."""
    values = {parameter_name(item.owner, item.leaf): item.value for item in found}
    ends: list[Folded] = []
    for fqn, first in going.items():
        name = ties.weight_name(plan.sites[first])
        owner, _, leaf = ties.weight_name(plan.sites[fqn]).rpartition(".")
        ends.append(Folded(owner, leaf, values[name], same=name))
    return ends


def _fold(program: Program, fqn: str, edits: Sequence[Edit], weight_in_place: bool, sums: bool) -> list[Folded]:
    """New values for the tensors of a site, but for a weight that is to be folded in place."""
    site = program.plan.sites[fqn]
    if not isinstance(site, WeightSite):
        return fold_copies(program.adapters[edits[-1].adapter].part(edits[-1]))
    found: list[Folded] = []
    if not weight_in_place:
        owner, leaf = owner_of(site)
        weight = tensor_of(program.base, owner, leaf).detach()
        value, taken = fold_weight(program.adapters, site, edits, weight, sums)
        found.append(Folded(owner, leaf, value, sums=taken))
    if site.bias is None:
        return found
    owner, _, leaf = site.bias.rpartition(".")
    folded = fold_bias(
        site,
        edits,
        whole(tensor_of(program.base, owner, leaf)).detach(),
        value_in(program.adapters),
        lambda: whole(tensor_of(program.base, *owner_of(site))).detach(),
    )
    return found if folded is None else [*found, Folded(owner, leaf, folded)]


def _in_place(program: Program, groups: dict[str, list[Edit]]) -> dict[str, WeightSite]:
    """The sites whose weights are folded in place. Raises MergeError if the model does not own them."""
    weights: dict[str, Tensor] = {}
    sites = {fqn: site for fqn in groups if isinstance(site := program.plan.sites[fqn], WeightSite)}
    for fqn, site in sites.items():
        owner, leaf = owner_of(site)
        weight = tensor_of(program.base, owner, leaf)
        if ties.partner(program, owner, leaf) is not None:
            continue  # The other end keeps the original.
        if weight.is_meta or type(weight.data) is not Tensor or weight.is_inference() or weight.device.type == "mps":
            raise MergeError(
                f"{owner}.{leaf}: undo='residual' needs a dense tensor of a device with float64, outside of inference mode;"
                " use undo='keep'"
            )
        weights[fqn] = weight
    require_own(program, {str(sites[fqn].weight): weight for fqn, weight in weights.items()})
    return {fqn: sites[fqn] for fqn in weights}


def _exchange(program: Program, item: Folded, keep: bool, held: Container[int], moved: Container[str]) -> None:
    """Put the new tensor in the place of the old one, which the journal keeps as it is: the same object, ties and all.

    `held`: by id, the parameters that FSDP2 manages. `moved`: the names of those that stay tied.
    """
    slots = slots_of(program.base, item.owner, item.leaf)
    old: Tensor = slots[item.leaf]
    if id(old) in held and item.same is not None:
        return
    if id(old) in held:
        # FSDP2 holds the parameter itself, so the values change and the object stays.
        original = own(old).clone() if keep else None
        put(old, item.value)
        sums = (checksum(original), checksum(old)) if original is not None else (None, None)
        program.merge.replaced.append(Replaced(item.owner, item.leaf, sums[0], original, sums[1]))
        return
    if parameter_name(item.owner, item.leaf) not in moved:
        ties.cut(program, item.owner, item.leaf)
    value = shard_as(item.value, old) if is_sharded(old) and not is_sharded(item.value) else item.value
    original = old if keep else None
    crc, new = (item.sums or (checksum(old), checksum(value))) if keep else (None, None)
    shape = tuple(value.shape) if keep else None
    program.merge.replaced.append(Replaced(item.owner, item.leaf, crc, original, new, shape))
    if item.same is not None:
        slots[item.leaf] = parameter_at(program.base, item.same)
    else:
        slots[item.leaf] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
