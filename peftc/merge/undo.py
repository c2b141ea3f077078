"""Undoing a merge: what the journal needs for it, and doing it."""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import MergeError
from peftc.graph.finding import holder_of
from peftc.graph.sites import WeightSite, dtype_name, parameter_name
from peftc.memory import in_huge_pages
from peftc.merge import ties
from peftc.merge.fold import Value, edits_by_site, fold_of, value_in
from peftc.merge.threads import side_by_side
from peftc.merge.undo_log import Chunk, checksum, decode, encode
from peftc.plan import Edit
from peftc.progress import Tick, unseen
from peftc.rewrite.parts import tensor_slots
from peftc.rewrite.program import Merged, Program, Replaced
from peftc.rewrite.sharding import is_sharded, own
from peftc.rewrite.switch import emit, train


def owner_of(site: WeightSite) -> tuple[str, str]:
    """The fqn of the module that holds the weight of `site`, and its name there."""
    assert site.weight is not None, "without one no edit is mergeable"
    owner, _, leaf = site.weight.rpartition(".")
    return owner, leaf


def slots_of(base: nn.Module, owner: str, leaf: str) -> dict[str, Any]:
    """The dict that holds the tensor `leaf` of module `owner`."""
    return tensor_slots(*holder_of(base, parameter_name(owner, leaf)))


def tensor_of(base: nn.Module, owner: str, leaf: str) -> Tensor:
    """The tensor `leaf` of module `owner` as it is now."""
    return slots_of(base, owner, leaf)[leaf]


def fold_in_place(program: Program, site: WeightSite, edits: Sequence[Edit]) -> None:
    """Fold into the weight itself, tile by tile; the journal gets the log of what undoing can't compute."""
    owner, leaf = owner_of(site)
    weight = tensor_of(program.base, owner, leaf).detach()
    for edit in edits:
        for param in edit.params:
            value = program.adapters[edit.adapter].tensor(edit, param.key).detach().clone()
            program.merge.factors[edit.adapter, edit.site, param.name] = value
    fold = fold_of(site, edits, weight, value_in(program.adapters), back=_as_merged(program.merge, weight))
    crc, log = checksum(weight), list[Chunk]()

    def made(part: slice, axis: str) -> tuple[slice, Tensor, Tensor, Chunk]:
        old = weight[part].clone()
        new = fold.new(part, axis, old)
        return part, old, new, encode(old, fold.estimate(part, axis, new))

    try:
        with side_by_side(weight.device) as run:
            for part, old, new, chunk in run(partial(made, *part) for part in fold.parts):
                _write_tile(weight[part], old, new, log, chunk)
    finally:
        # Also what was done of it before something failed.
        program.merge.replaced.append(Replaced(owner, leaf, crc, merged=checksum(weight), log=tuple(log)))


def _write_tile(tile: Tensor, old: Tensor, new: Tensor, log: list[Chunk], chunk: Chunk) -> None:
    """Overwrite a tile and log it: both or, if interrupted, neither."""
    length = len(log)
    try:
        tile.copy_(new)
        log.append(chunk)
    except BaseException:
        tile.copy_(old)
        del log[length:]
        raise


def _as_merged(merged: Merged, weight: Tensor) -> Value:
    """The adapters' tensors as they were when merged, which the way back goes by."""
    factors = merged.factors
    return lambda edit, param: factors[edit.adapter, edit.site, param.name].to(weight.device)


def require_intact(program: Program, item: Replaced, check: bool) -> None:
    """Refuse to undo if a tensor that undoing goes by is no longer what it was."""
    name = parameter_name(item.owner, item.leaf)
    now = tensor_of(program.base, item.owner, item.leaf)
    if item.original is not None:
        merged = item.original.shape if item.shape is None else item.shape
        now = own(now) if item.shape is None else now  # Of what FSDP2 holds, shards are compared.
        if now.shape != merged:
            raise MergeError(
                f"{name}: was resized from {tuple(merged)} to {tuple(now.shape)} while merged; the original"
                " does not fit any more. Resize it back, or keep the merge (merge_and_unload)."
            )
        if check and checksum(item.original) != item.crc:
            raise MergeError(
                f"{name}: the original tensor was changed while merged (by whoever shares it with this model), so undoing"
                " would not give the weights from before. unmerge_adapter(check=False) puts it back as it is now."
            )
        if check and now.dtype == item.original.dtype and checksum(now) != item.merged:
            raise MergeError(
                f"{name}: the merged tensor was changed (trained, or loaded into), and undoing would lose that."
                " unmerge_adapter(check=False) does; merge_and_unload() keeps it."
            )
        return
    sites = (site for site in program.plan.sites.values() if isinstance(site, WeightSite))
    dtype = next(site.dtype for site in sites if site.weight == name)
    if dtype_name(now.dtype) != dtype:
        raise MergeError(
            f"{name}: was {dtype} when merged and is {dtype_name(now.dtype)} now; cast the model back first"
        )
    if check and checksum(now) != item.merged:
        raise MergeError(
            f"{name}: the merged tensor was changed, so its log does not give the original. Undo the change;"
            " unmerge_adapter(check=False) gives what is near the original, but not its bits."
        )


def restore(program: Program, check: bool, tick: Tick = unseen) -> None:
    """Undo what the journal holds, last first. An entry is dropped when it is done, so an interrupted undo can go on."""
    merge = program.merge
    groups = {
        str(site.weight): edits
        for fqn, edits in edits_by_site(program, program.merged).items()
        if isinstance(site := program.plan.sites[fqn], WeightSite)
    }
    while merge.replaced:
        item = merge.replaced[-1]
        slots = slots_of(program.base, item.owner, item.leaf)
        now = slots[item.leaf]
        if item.original is not None and is_sharded(now) and not is_sharded(item.original):
            own(now).copy_(item.original)
        elif item.original is not None:
            # Moved or cast since: the original goes along.
            item.original.data = item.original.data.to(device=now.device, dtype=now.dtype)
            slots[item.leaf] = item.original
        elif item.log:
            now.detach().copy_(
                _unfolded(program, groups[parameter_name(item.owner, item.leaf)], now.detach(), item, check)
            )
        merge.replaced.pop()
        tick()
    merge.factors.clear()
    ties.mend(program)
    paused, merge.paused, merge.names = merge.paused, (), ()
    emit(program)
    train(program, [name for name in program.plan.adapters if name in (*program.learning, *paused)])


def _unfolded(program: Program, edits: Sequence[Edit], merged: Tensor, item: Replaced, check: bool) -> Tensor:
    """The original of an in-place fold, from the merged tensor and its log."""
    site = program.plan.sites[edits[0].site]
    assert isinstance(site, WeightSite), "only weights are folded in place"
    value = _as_merged(program.merge, merged)
    fold, old = fold_of(site, edits, merged, value, back=value), in_huge_pages(torch.empty_like(merged))

    def write(part: slice, axis: str, chunk: Chunk | None) -> None:
        tile = merged[part]  # Nothing was done to it, if the log has nothing.
        old[part] = tile if chunk is None else decode(chunk, fold.estimate(part, axis, tile))

    with side_by_side(merged.device) as run:
        for _ in run(partial(write, *part, chunk) for part, chunk in zip_longest(fold.parts, item.log)):
            pass
    if check and checksum(old) != item.crc:
        raise MergeError(
            f"{site.weight}: undoing the merge did not give the original bits; the merged weight was left as it is"
        )
    return old
