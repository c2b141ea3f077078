"""The files of a merged checkpoint, and of the base again: which bytes are copied, and which are computed."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.tensor_file import Entry, Header, bytes_of, make_header, read_json
from peftc.graph.sites import transformers_config
from peftc.merge import ties
from peftc.merge.undo_log import encode, keep
from peftc.stream.log import Log, record, restored
from peftc.stream.sharded import UNDO, inside
from peftc.stream.tiles import Merged, Recipe, fused_recipes, outline_of, recipe, together
from peftc.stream.work import Change, Work, file_of, stored_name
from peftc.stream.write import Output, Piece, Tile

# Bytes that are read, and written, at a time.
BLOCK = 8 << 20
Recipes = Mapping[str, Callable[[], Recipe]]


def merged_outputs(work: Work, undo: bool) -> list[Output]:
    """The shards of the merged checkpoint. `undo`: with logs."""
    recipes, added, shapes = recipes_of(work, undo, None), added_tensors(work), _resized(work)
    outputs: list[Output] = []
    for name, header in work.checkpoint.shards.items():
        new = {tensor: source for tensor, source in added.items() if work.checkpoint.where[source] == name}
        whole = _changed(header, new, shapes) if new or shapes.keys() & header.entries.keys() else header
        # A tensor that is elsewhere, as the index says, is nobody's here, and copied.
        own = {*new, *(tensor for tensor in header.entries if work.checkpoint.where.get(tensor) == name)}
        pieces = [
            _merged_piece(work, entry, header.entries[new.get(tensor, tensor)], recipes if tensor in own else {}, undo)
            for tensor, entry in whole.entries.items()
        ]
        outputs.append(Output(name, whole, pieces, work.shards[name], log_name(name) if undo else None))
    return outputs


def base_outputs(work: Work, log: Log) -> list[Output]:
    """The shards of the base, from those of the merged checkpoint that `work.shards` are."""
    recipes = recipes_of(work, True, lambda stored, part: file_of(work, stored).rows(stored, part))
    outputs: list[Output] = []
    for name, header in work.checkpoint.shards.items():
        file = work.shards[name]
        pieces = [
            Piece(
                entry,
                file.header.entries[tensor],
                partial(_base_jobs, recipes[tensor], log, tensor, _width(entry))
                if tensor in recipes and work.checkpoint.where[tensor] == name
                else None,
            )
            for tensor, entry in header.entries.items()
        ]
        outputs.append(Output(name, header, pieces, file))
    return outputs


def copied(name: str, file: FileTensors) -> Output:
    """A copy of a file."""
    return Output(name, file.header, [Piece(entry, entry) for entry in file.header.entries.values()], file)


def log_name(shard: str) -> str:
    """Where the log of a shard is, in the folder of the merged checkpoint."""
    return f"{UNDO}/{shard}.log"


def recipes_of(work: Work, undo: bool, merged: Merged | None) -> Recipes:
    """How every tensor that changes comes about, by its name in the merged checkpoint."""
    found: dict[str, Callable[[], Recipe]] = {}
    fused: dict[int, list[Change]] = {}
    for parameter, change in work.changes.items():
        if parameter in work.names.fused:
            fused.setdefault(id(work.names.fused[parameter]), []).append(change)
            continue
        stored = stored_name(work, parameter)
        assert stored is not None, "looked for when the changes were made"
        # One end of a tie that is cut: the stored tensor stays the other end's.
        name = stored if parameter not in work.cut or parameter in work.names.direct else parameter
        found[name] = partial(recipe, work, change, stored, undo, merged)
        if parameter not in work.cut:  # Some checkpoints store both ends of a tie.
            ends = next((group for group in work.program.plan.ties if parameter in group), ())
            others = {work.names.direct[end] for end in ends if end in work.names.direct} - {stored}
            found |= {other: partial(recipe, work, change, other, undo, merged) for other in others}
    for changes in fused.values():
        fusion = work.names.fused[changes[0].parameter]
        made = fused_recipes(work, fusion, changes, undo, merged)
        found |= {stored: partial(made.__getitem__, stored) for stored in fusion.parts}
    return found


def added_tensors(work: Work) -> dict[str, str]:
    """Tensors that the merged checkpoint has more, where a tie is cut, and the stored one that each was the same as."""
    added: dict[str, str] = {}
    ends = list(work.cut)
    if work.cut and ties.says_tied(work.program.base):  # Then the config will say of none that it is tied.
        ends += sorted(ties.tied_by_config(work.program.base))
    for parameter in ends:
        group = next((group for group in work.program.plan.ties if parameter in group), ())
        source = stored_name(work, parameter)
        added |= {name: source for name in group if source is not None and name not in work.names.direct}
    return added


def changed_files(work: Work) -> dict[str, bytes]:
    """The config and the index, where cutting a tie changes what they say."""
    shapes, added, files = _resized(work), added_tensors(work), dict[str, bytes]()
    if shapes:
        files["config.json"] = _json(_with_vocabulary(work, read_json(inside(work.checkpoint.folder, "config.json"))))
        if work.checkpoint.index is not None:
            files[work.checkpoint.index] = _json(
                _without_sizes(read_json(inside(work.checkpoint.folder, work.checkpoint.index)))
            )
    if not work.cut:
        return files
    if ties.says_tied(work.program.base):
        data = files.get("config.json") or inside(work.checkpoint.folder, "config.json").read_bytes()
        files["config.json"] = _json({**json.loads(data), "tie_word_embeddings": False})
    if work.checkpoint.index is not None and added:
        data = read_json(inside(work.checkpoint.folder, work.checkpoint.index))
        data["weight_map"] |= {name: work.checkpoint.where[source] for name, source in added.items()}
        entries = [work.checkpoint.entry(source) for source in added.values()]
        sizes = {"total_size": sum(e.nbytes for e in entries), "total_parameters": sum(_numel(e) for e in entries)}
        metadata: Any = data.get("metadata")
        for key, size in sizes.items() if isinstance(metadata, dict) else ():
            if type(metadata.get(key)) is int:
                metadata[key] += size
        files[work.checkpoint.index] = _json(data)
    return files


def _with_vocabulary(work: Work, data: dict[str, Any]) -> dict[str, Any]:
    """The config with the model's size of the vocabulary, where it says one."""
    config: Any = transformers_config(work.program.base)
    if "vocab_size" in data:
        return {**data, "vocab_size": config.vocab_size}
    text: Any = data.get("text_config")
    return {**data, "text_config": {**text, "vocab_size": config.get_text_config().vocab_size}} if text else data


def _without_sizes(data: dict[str, Any]) -> dict[str, Any]:
    """The index without totals that no longer hold; they only inform."""
    metadata: Any = data.get("metadata") or {}
    return {**data, "metadata": {key: value for key, value in metadata.items() if not key.startswith("total_")}}


def _changed(header: Header, new: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Header:
    """The header with tensors `new`, each like another, and with other `shapes`."""
    entries = {**header.entries, **{name: header.entries[source] for name, source in new.items()}}
    sizes: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, entry in entries.items():
        shape = shapes.get(name, entry.shape)
        sizes.append((name, entry.dtype, shape, _width(entry) * shape[0] if name in shapes else entry.nbytes))
    return make_header(sizes, header.metadata)


def _resized(work: Work) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that an adapter brings in another size, by their names in the merged checkpoint."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter, change in work.changes.items():
        stored = stored_name(work, parameter) if change.start is not None else None
        if stored is None:
            continue
        shape = tuple(outline_of(work, change, stored).shape)
        if shape != tuple(work.checkpoint.entry(stored).shape):
            ends = next((group for group in work.program.plan.ties if parameter in group), (parameter,))
            whole = (parameter,) if parameter in work.cut else ends
            found |= {work.names.direct.get(name, name): shape for name in whole}
    return found


def _merged_piece(work: Work, entry: Entry, source: Entry, recipes: Recipes, undo: bool) -> Piece:
    found = recipes.get(entry.name)
    jobs = partial(_merge_jobs, work, found, entry.name, source.name, undo) if found is not None else None
    return Piece(entry, source, jobs)


def _merge_jobs(
    work: Work, found: Callable[[], Recipe], name: str, source: str, undo: bool
) -> Iterator[Callable[[], Tile]]:
    own, width = found(), _width(work.checkpoint.entry(source))
    for parts in _blocks(own.parts, width):
        yield partial(_merge, work, own, parts, width, name, source, undo and name == source)


def _merge(work: Work, own: Recipe, parts: Sequence[slice], width: int, name: str, source: str, undo: bool) -> Tile:
    new, estimates = own.make(parts)
    content, begin = bytes_of(new), parts[0].start
    if not undo:
        return Tile(begin * width, content)
    old, records = file_of(work, source).rows(source, together(parts)), list[bytes]()
    for part, estimate in zip(parts, estimates, strict=True):
        before = old[part.start - begin : part.stop - begin] if old.dim() else old
        chunk = keep(before) if estimate is None else encode(before, estimate)
        after = content[(part.start - begin) * width : (part.stop - begin) * width]
        records.append(record(name, chunk, zlib.crc32(after), zlib.crc32(bytes_of(before))))
    return Tile(begin * width, content, b"".join(records))


def _base_jobs(found: Callable[[], Recipe], log: Log, name: str, width: int) -> Iterator[Callable[[], Tile]]:
    own = found()
    numbers = {part.start: number for number, part in enumerate(own.parts)}
    for parts in _blocks(own.parts, width):
        yield partial(_unmerge, own, parts, width, log, name, numbers[parts[0].start])


def _unmerge(own: Recipe, parts: Sequence[slice], width: int, log: Log, name: str, number: int) -> Tile:
    new, estimates = own.make(parts)
    begin = parts[0].start
    content = [
        restored(log, name, number + i, new[part.start - begin : part.stop - begin] if new.dim() else new, estimate)
        for i, (part, estimate) in enumerate(zip(parts, estimates, strict=True))
    ]
    return Tile(begin * width, b"".join(content))


def _blocks(parts: Sequence[slice], width: int) -> Iterator[Sequence[slice]]:
    """`parts` in groups that are worth a call to the file system; `width`: the bytes of a row."""
    first = 0
    for last in range(1, len(parts) + 1):
        if last == len(parts) or (parts[last].stop - parts[first].start) * width > BLOCK:
            yield parts[first:last]
            first = last


def _width(entry: Entry) -> int:
    return entry.nbytes // max(1, entry.shape[0]) if entry.shape else entry.nbytes


def _numel(entry: Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count


def _json(data: Mapping[str, Any]) -> bytes:
    """As transformers writes its configs and indexes."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
