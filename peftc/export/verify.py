"""Checking an artefact again: against its certificate, or a merged checkpoint against its base and adapter."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftc.errors import ExportError
from peftc.export.adapter_inputs import with_adapters
from peftc.export.certificate import Certificate, difference, hashes, read, tensors_of
from peftc.export.exporters import COMPILED, PLAIN, loaded, run_compiled, run_onnx
from peftc.export.request import require_packages
from peftc.progress import bar
from peftc.stream import merge_checkpoint
from peftc.view.groups import natural

PathLike = str | os.PathLike[str]


def verify(*folders: PathLike, tolerance: float = 1e-4, untie: bool = False, progress: bool = True) -> Certificate:
    """Check an export, or a merged checkpoint, again.

    `verify(folder)`: the files are those that were exported, and what they compute on the certificate's inputs is what the
    live model computed, within `tolerance` times the largest output. `verify(base, adapter, merged)`: the checkpoint
    `merged`, whoever made it, is the base with the adapter, tensor by tensor, within the rounding of its dtype and
    `tolerance`; `progress` shows how far that is, if somebody looks on. Returns what was found. Raises ExportError, naming
    the file or the tensor, if it is not so.

    Example: print(peftc.verify("exported"))
    """
    if len(folders) == 1:
        return _exported(Path(folders[0]), tolerance)
    if len(folders) != 3:
        raise ExportError(
            "verify takes the folder of an export, or those of a base, an adapter and the merged checkpoint"
        )
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "merged"
        merge_checkpoint(folders[0], folders[1], expected, untie=untie, progress=progress)
        largest, scale = _compared(expected, Path(folders[2]), tolerance, progress)
    return Certificate("hf", "merged", (str(folders[1]),), largest, scale, files=hashes(Path(folders[2])))


def _exported(folder: Path, tolerance: float) -> Certificate:
    certificate, inputs, outputs = read(folder)
    now = hashes(folder)
    wrong = [name for name, sha in certificate.files.items() if now.get(name) != sha]  # Others may lie beside them.
    if wrong:
        raise ExportError(f"{folder}: {', '.join(sorted(wrong))} is not what was exported")
    if certificate.of != "outputs":
        return certificate  # The files are those; what they change was compared when they were written.
    with torch.no_grad():
        largest, scale = difference(tensors_of(_run(folder, certificate, inputs)), outputs)
    if largest > tolerance * max(scale, 1e-30):
        raise ExportError(f"{folder}: outputs differ by {largest:.3g} from the live model's, of {scale:.3g}")
    return replace(certificate, difference=largest, scale=scale)


def _run(folder: Path, certificate: Certificate, inputs: Mapping[str, Tensor]) -> Any:
    require_packages(certificate.to)
    if certificate.adapters == "inputs":
        return with_adapters(folder)(certificate.names[0], inputs)
    if certificate.to == "hf":
        import json

        import transformers

        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        return getattr(transformers, name).from_pretrained(folder).eval()(**inputs)
    if certificate.to == "aoti":
        return run_compiled(folder / COMPILED)(inputs)
    if (folder / PLAIN).exists() and not (folder / "export.json").exists():
        return torch.export.load(folder / PLAIN).module()(**inputs)
    if (folder / "model.onnx").exists() and not (folder / "export.json").exists():
        return run_onnx(folder / "model.onnx")(inputs)
    return loaded(folder)(inputs)


def _compared(expected: Path, merged: Path, tolerance: float, progress: bool) -> tuple[float, float]:
    """The largest difference between the tensors of two checkpoints, and the largest value. Raises ExportError."""
    largest, scale = 0.0, 0.0
    ours, theirs = _tensors(expected), _tensors(merged)
    if set(ours) != set(theirs):
        names = sorted(set(ours) ^ set(theirs), key=natural)
        raise ExportError(f"{merged}: {names[0]} and {len(names) - 1} more tensors are in one of the two alone")
    with bar("compare", len(ours), "tensors", progress) as tick:
        for name, file in ours.items():
            found, size = _apart(name, _read(file, name), _read(theirs[name], name), merged, tolerance)
            largest, scale = max(largest, found), max(scale, size)
            tick()
    return largest, scale


def _apart(name: str, one: Tensor, other: Tensor, merged: Path, tolerance: float) -> tuple[float, float]:
    """How much the tensor `name` of `merged`, which is `other`, differs from `one`, and how large that is."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ExportError(f"{name}: {other.dtype} {tuple(other.shape)}, expected {one.dtype} {tuple(one.shape)}")
    if not one.is_floating_point():
        if not torch.equal(one, other):
            raise ExportError(f"{merged}: {name} is not the base's")
        return 0.0, 0.0
    found, size = difference({name: other}, {name: one})
    if found > (tolerance + 2 * torch.finfo(one.dtype).eps) * max(size, 1e-30):
        raise ExportError(f"{merged}: {name} differs by {found:.3g}, of {size:.3g}, from the base with the adapter")
    return found, size


def _tensors(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by tensor."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise ExportError(f"{folder}: holds no safetensors")
    return found


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
        return opened.get_tensor(name)
