"""What an export was compared with: beside the artefact, as JSON and the tensors of the comparison."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftc.checkpoint.base import fingerprint_of
from peftc.checkpoint.state import saved_state_dict
from peftc.errors import ExportError
from peftc.rewrite.program import Program

NAME = "certificate.json"
SAMPLES = "certificate.safetensors"
_VERSIONS = ("peftc", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "gguf")


@dataclass(frozen=True)
class Certificate:
    """An artefact and the live model on the same inputs.

    `to` and `adapters` as they were exported; `names` of the adapters in it. `difference`: the largest of any output, and
    `scale` the largest output. `tokens`: greedy tokens that were compared, `tokens_equal` how many of them are the same
    before the first that is not (None: the model generates none); `generation`: whether what generates keeps caches, if
    there is any. `files`: the SHA-256 of every file of the artefact. `of`: what the difference is of: outputs, the changes
    of weights that adapters beside a base make, or merged weights. `sources`: hashes of what it was made from: every
    adapter's tensors as its file has them, and the base's fingerprint as manifests have it. `compared`: the other inputs,
    by their sizes, that a program gives the same outputs for; `refused`: those that it refuses, and the model does not.
    """

    to: str
    adapters: str
    names: tuple[str, ...]
    difference: float
    scale: float
    tokens: int | None = None
    tokens_equal: int | None = None
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    of: str = "outputs"
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    generation: str | None = None
    compared: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"{self.to}, adapters {self.adapters} ({', '.join(self.names) or 'none'})"
        lines = [f"{said}: {self.of} differ by {self.difference:.2g} at most, of {self.scale:.3g}"]
        if self.tokens is not None:
            how = f" ({self.generation})" if self.generation is not None else ""
            lines.append(f"greedy tokens{how}: {self.tokens_equal} of {self.tokens} are the same")
        if self.compared:
            lines.append(f"so they are for {len(self.compared)} other sizes")
        if self.refused:
            lines.append(
                f"not for {' | '.join(self.refused[:3])}{' | …' if len(self.refused) > 3 else ''}, which it refuses"
            )
        return "; ".join(lines)

    def write(self, folder: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Put it into the folder of its artefact, with the inputs and the live model's outputs."""
        tensors = {f"input.{name}": value for name, value in inputs.items()}
        tensors |= {f"output.{name}": value for name, value in outputs.items()}
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, folder / SAMPLES
        )
        (folder / NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def certify(
    folder: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], *said: Any, **more: Any
) -> Certificate:
    """Write the certificate of the artefact in `folder`: `said` and `more` are a Certificate's fields from `to` on."""
    certificate = Certificate(*said, files=hashes(folder), versions=versions(), **more)
    certificate.write(folder, inputs, outputs)
    return certificate


def read(folder: Path) -> tuple[Certificate, dict[str, Tensor], dict[str, Tensor]]:
    """A certificate with its inputs and outputs. Raises ExportError if there is none that can be read."""
    try:
        data: dict[str, Any] = json.loads((folder / NAME).read_text())
        tensors = load_file(folder / SAMPLES)
        data |= {name: tuple(data[name]) for name in ("names", "compared", "refused") if name in data}
        certificate = Certificate(**data)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{folder}: holds no certificate of an export that can be read: {error}") from None
    inputs, outputs = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("input.", "output.")
    )
    return certificate, inputs, outputs


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder but the certificate's own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, SAMPLES))
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources(program: Program, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of every adapter's tensors by key, and of the fingerprint of their base."""
    found: dict[str, str] = {}
    for name in names:
        digest = hashlib.sha256()
        for key, tensor in sorted(saved_state_dict(program, name).items()):
            digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
        found["base"] = hashlib.sha256(repr(fingerprint_of(program, name)).encode()).hexdigest()
    return found


def versions() -> dict[str, str]:
    """The versions of the packages that had a part in it."""
    found: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def difference(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """The largest difference of any output that both have, and the largest value expected. Raises ExportError if they
    have none in common, or of other shapes.
    """
    common = [name for name in expected if name in outputs]
    if not common:
        raise ExportError(f"the artefact gives {sorted(outputs)}, the model {sorted(expected)}: nothing to compare")
    largest, scale = 0.0, 0.0
    for name in common:
        one, other = outputs[name].detach().cpu().double(), expected[name].detach().cpu().double()
        if one.shape != other.shape:
            raise ExportError(f"{name}: the artefact gives {tuple(one.shape)}, the model {tuple(other.shape)}")
        finite = torch.isfinite(other)
        largest = max(largest, float((one - other)[finite].abs().max()) if finite.any() else 0.0)
        scale = max(scale, float(other[finite].abs().max()) if finite.any() else 0.0)
    return largest, scale


def agreement(pairs: Iterable[tuple[Sequence[int] | None, Sequence[int] | None]]) -> dict[str, int | None]:
    """How many tokens there are, and how many are the same before the first that is not, as a certificate says it."""
    tokens = equal = None
    for one, other in pairs:
        if one is not None and other is not None:
            same = next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
            tokens, equal = (tokens or 0) + len(one), (equal or 0) + same
    return {"tokens": tokens, "tokens_equal": equal}


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors of a model's outputs, by name (a number where they have none)."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    items: Iterable[tuple[Any, Any]] = (
        outputs.items()
        if isinstance(outputs, Mapping)
        else enumerate(outputs)
        if isinstance(outputs, tuple | list)
        else ()
    )
    return {str(name): value for name, value in items if isinstance(value, Tensor) and value.is_floating_point()}
