"""Whether the weights in a folder are those of the base that an adapter was saved with. A few of their values are read."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peftc import lifecycle
from peftc.checkpoint.base import Sampler, places, require_base, sample_from
from peftc.checkpoint.files import AdapterFiles
from peftc.checkpoint.lazy import FileTensors, outline
from peftc.checkpoint.spelling import respelled_spec
from peftc.checkpoint.tensor_file import DTYPES
from peftc.plan import require_applicable
from peftc.rewrite.build import build
from peftc.stream.sharded import Checkpoint, open_checkpoint, opened_shards
from peftc.stream.skeleton import resize_vocabulary, skeleton
from peftc.stream.work import stored_as


def compare_base(folder: Path, files: AdapterFiles, tensors: FileTensors, model: nn.Module | None) -> str | None:
    """Compare the checkpoint in `folder` with the base that an adapter was saved with, as `files` say; a caution if a part
    of it differs.

    `tensors`: the adapter's open file. `model`: one of the checkpoint's structure, if its config names none. Raises
    CheckpointError if it is another model, or no adapter like this can be on it (NoMatchError).
    """
    assert files.base is not None, "there is something to compare with"
    checkpoint, held = open_checkpoint(folder), outline(tensors.header.entries)
    own, names = skeleton(checkpoint, model, [held])
    resize_vocabulary(own, [(files.where, files.spec, held)])
    there = files.on(own)
    specs = {"default": respelled_spec(own, there.spec, there.tensors)}
    plan, regions = lifecycle.planned(own, specs, "modules", autocast=True, fresh=False)
    require_applicable(plan, "warn")
    program = build(own, plan, regions, inplace=True, fresh=False)
    with opened_shards(checkpoint) as shards:
        return require_base(program, files.base, sampler(checkpoint, shards, partial(stored_as, names, plan.ties)))


def sampler(
    checkpoint: Checkpoint, shards: Mapping[str, FileTensors], stored_of: Callable[[str], str | None]
) -> Sampler:
    """What takes the sample of a parameter out of a checkpoint. `stored_of`: which of its tensors a parameter is."""

    def sample(parameter: str, _: Tensor) -> str | None:
        stored = stored_of(parameter)
        if stored is None:
            return None
        entry, file = checkpoint.entry(stored), shards[checkpoint.where[stored]]
        dtype = DTYPES.get(entry.dtype, torch.uint8)
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return None
        starts = (entry.start + dtype.itemsize * int(place) for place in places(entry.shape))
        content = b"".join(bytes(file.read(start, start + dtype.itemsize)) for start in starts)
        return sample_from(torch.frombuffer(bytearray(content), dtype=dtype), entry.shape)

    return sample
