"""The merged model as a GGUF file: the base's own file, in which the tensors that adapters change are written anew.

What no adapter changes, and all metadata (the tokenizer, the form for chats), is the file's, byte for byte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftc.errors import ExportError
from peftc.export.gguf_names import architecture_of, package, tensor_names, turned, turned_heads
from peftc.graph.sites import WeightSite, transformers_config
from peftc.plan import Plan
from peftc.rewrite.program import Program

FILE = "model.gguf"
# How far a base's tensor may be from the model's, of its norm. Two bits a number come to a third; other models, or rows in
# another order, to 1.4.
_SAME = 0.6


@dataclass(frozen=True)
class Changed:
    """A tensor `value` that merging has changed, as llama.cpp lays it out; what it `was`, if that is kept; its `kind`."""

    value: Tensor
    was: Tensor | None
    kind: Any


def write_merged(program: Program, source: Path, quantized: bool, stage: Path) -> tuple[float, float]:
    """Write `model.gguf` of the merged `program` and the base's file `source`.

    Tensors that change keep the file's type, but quantised ones are of float16 unless they are to be `quantized` again.
    Returns the largest difference of what was written to the live model's merged weights, and the largest of these.
    Raises ExportError.
    """
    gguf = package()
    reader = _opened(gguf, source)
    held = {tensor.name: tensor for tensor in reader.tensors}
    config = transformers_config(program.base)
    own, architecture = reader.fields["general.architecture"].contents(), architecture_of(config)
    if own != architecture:
        raise ExportError(f"{source}: is of architecture {own}, and the model is {architecture}")
    changed = {
        name: Changed(change.value, change.was, _kind(gguf, name, held.get(name), change.value, quantized))
        for name, change in _changes(program, config, set(held)).items()
    }
    for name, change in changed.items():
        if name in held:
            _require_same(gguf, name, held[name], change, source)
    _write(gguf, reader, changed, stage / FILE)
    return _compared(gguf, reader, changed, stage / FILE)


def _opened(gguf: Any, source: Path) -> Any:
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{source}: no GGUF file that can be read: {error}") from None
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise ExportError(f"{source}: is one of several parts; join them first (llama-gguf-split --merge)")
    if "general.architecture" not in reader.fields:
        raise ExportError(f"{source}: says no general.architecture")
    return reader


def _changes(program: Program, config: Any, held: set[str]) -> dict[str, Changed]:
    """By llama.cpp's name, what merging has changed, and other ends of a tie that the file has to say anew."""
    base, overlay = program.base, program.overlay
    before: dict[str, Tensor | None] = {f"{one.owner}.{one.leaf}": one.original for one in program.merge.replaced}
    before |= {name: overlay.base_value(base, name) for name, adapter in overlay.present.items() if adapter is not None}
    if not before:
        raise ExportError(
            "to='gguf', adapters='merged': no adapter is active, so nothing of the base's file would change"
        )
    state = base.state_dict()
    names = tensor_names(config, {*before, *(name for group in program.plan.ties for name in group if name in state)})
    for group in program.plan.ties:
        moved = [name for name in group if name in before]
        others = [name for name in group if name in state and name not in before]
        for name in others if moved else ():
            tied = torch.equal(state[name], state[moved[0]])
            # The file may hold both ends of what the model ties, and one of what merging has cut.
            if tied == (names[name] in held):
                before[name] = before[moved[0]] if tied else None
    turns, layouts = turned_heads(config), _layouts(program.plan)

    def laid(name: str, tensor: Tensor) -> Tensor:
        heads = turns.get(name.split(".")[-2])
        tensor = tensor.detach().cpu()
        tensor = tensor.T if layouts.get(name) == "in_out" else tensor
        return (tensor if heads is None else turned(tensor, heads)).contiguous()

    return {
        names[name]: Changed(laid(name, state[name]), None if was is None else laid(name, was), None)
        for name, was in before.items()
    }


def _layouts(plan: Plan) -> dict[str, str]:
    """How weights of linear maps lie, by their names; embeddings lie in GGUF as they do in the model."""
    sites = (site for site in plan.sites.values() if isinstance(site, WeightSite) and site.op != "embedding")
    return {site.weight: site.layout for site in sites if site.weight is not None}


def _kind(gguf: Any, name: str, held: Any, value: Tensor, quantized: bool) -> Any:
    """The type that a tensor is written in. Raises ExportError."""
    kinds = gguf.GGMLQuantizationType
    if held is None:
        return kinds.F16 if value.dim() > 1 else kinds.F32
    own = held.tensor_type
    if own in (kinds.F32, kinds.F16, kinds.BF16):
        return own
    if not quantized:
        return kinds.F16
    try:
        gguf.quants.quantize(np.zeros((1, 256), dtype=np.float32), own)
    except NotImplementedError:
        raise ExportError(
            f"quantized=True: {name} is {own.name}, which the package gguf can't write. Leave it out (changed tensors are"
            " of float16 then), and let llama-quantize make it smaller"
        ) from None
    return own


def _require_same(gguf: Any, name: str, held: Any, change: Changed, source: Path) -> None:
    """Raise ExportError if the file's tensor is not that of the base."""
    shape = tuple(int(size) for size in reversed(held.shape))
    if shape != tuple(change.value.shape):
        raise ExportError(f"{source}: {name} is {shape} there, and {tuple(change.value.shape)} in the model")
    if change.was is None:
        return
    own, was = torch.from_numpy(_numbers(gguf, held)).double(), change.was.double()
    distance = float((own - was).norm() / was.norm().clamp_min(1e-30))
    if distance > _SAME:
        raise ExportError(
            f"{source}: {name} is not the base's there (they differ by {distance:.2f} of its norm): it is the file of"
            " another model, or lies in an order that is not known here. Export the merged checkpoint, and convert that"
        )


def _numbers(gguf: Any, tensor: Any) -> Any:
    """The numbers of a file's tensor, in float32."""
    made = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(made, dtype=np.float32).reshape([int(size) for size in reversed(tensor.shape)])


def _encoded(gguf: Any, name: str, change: Changed) -> Any:
    """The bytes of a tensor in its type. Raises ExportError for numbers that it can't hold."""
    numbers = change.value.float().numpy()
    kind, kinds = change.kind, gguf.GGMLQuantizationType
    made = numbers.astype(np.float16) if kind == kinds.F16 else numbers
    if not np.isfinite(made).all():
        raise ExportError(f"to='gguf': {name} has numbers that {kind.name} can't hold")
    return made if kind in (kinds.F16, kinds.F32) else gguf.quants.quantize(numbers, kind)


def _write(gguf: Any, reader: Any, changed: Mapping[str, Changed], path: Path) -> None:
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents(), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue  # The writer says these.
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    kept = {tensor.name: tensor for tensor in reader.tensors}
    for name in dict.fromkeys([*kept, *changed]):
        if name in changed:
            _announce(gguf, writer, name, changed[name])
        else:
            data = kept[name].data
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kept[name].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in dict.fromkeys([*kept, *changed]):
        writer.write_tensor_data(_encoded(gguf, name, changed[name]) if name in changed else kept[name].data)
    writer.close()


def _announce(gguf: Any, writer: Any, name: str, change: Changed) -> None:
    shape, kind, kinds = tuple(change.value.shape), change.kind, gguf.GGMLQuantizationType
    plain = {kinds.F16: np.dtype(np.float16), kinds.F32: np.dtype(np.float32)}.get(kind)
    sizes = shape if plain is not None else gguf.quants.quant_shape_to_byte_shape(shape, kind)
    dtype = plain if plain is not None else np.dtype(np.uint8)
    writer.add_tensor_info(name, sizes, dtype, math.prod(sizes) * dtype.itemsize, kind)


def _compared(gguf: Any, reader: Any, changed: Mapping[str, Changed], path: Path) -> tuple[float, float]:
    """The largest difference of the changed tensors in the file to what they should be, and the largest of these.

    Raises ExportError if any other tensor is not the base's.
    """
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in reader.tensors:
        if tensor.name not in changed and not np.array_equal(written[tensor.name].data, tensor.data):
            raise ExportError(f"to='gguf': {tensor.name} did not come out as it was")
    largest = scale = 0.0
    for name, change in changed.items():
        made, value = torch.from_numpy(_numbers(gguf, written[name])).double(), change.value.double()
        largest = max(largest, float((made - value).abs().max()))
        scale = max(scale, float(value.abs().max()))
    return largest, scale
