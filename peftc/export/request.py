"""What an export is asked for, and why it can't be."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from peftc.choices import Adapters, Sizes, Target
from peftc.errors import ExportError
from peftc.export.tracing import require_compiler
from peftc.graph.sites import is_pretrained
from peftc.rewrite.hosts import original_class
from peftc.rewrite.parts import begins
from peftc.rewrite.program import Program, require_idle

# What becomes of the adapters, if nothing else is asked for.
DEFAULT: Mapping[str, Adapters] = {
    "hf": "merged",
    "pt2": "merged",
    "onnx": "merged",
    "aoti": "merged",
    "gguf": "beside",
    "mlx": "beside",
}
PROGRAMS = ("pt2", "onnx", "aoti")
_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "gguf": ("gguf",)}


@dataclass(frozen=True)
class Request:
    """What is to be written; see `CompiledModel.export`."""

    to: Target
    adapters: Adapters
    inputs: Mapping[str, Tensor] | None
    generation: bool
    tokenizer: Any
    gguf: Path | None
    quantized: bool
    progress: bool
    sizes: Sizes


def require_possible(program: Program, request: Request) -> None:
    """Raise ExportError for what can't be, before anything is done."""
    require_idle(program)
    to, adapters = request.to, request.adapters
    if to not in get_args(Target) or adapters not in get_args(Adapters):
        raise ExportError(
            f"to={to!r}, adapters={adapters!r}: valid are {', '.join(get_args(Target))};"
            f" {', '.join(get_args(Adapters))}"
        )
    given: Any = request.inputs
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise ExportError(f"inputs: got a {type(given).__name__}; give tensors by name, as {{'input_ids': ids}}")
    if to == "gguf" and adapters == "merged":
        _require_base(request)
    elif (adapters == "beside") != (DEFAULT[to] == "beside"):
        raise ExportError(
            f"to={to!r}, adapters={adapters!r}: gguf and mlx take adapters beside a base (adapters='beside'; gguf also"
            " 'merged'), hf, pt2, onnx and aoti are whole models (adapters='merged', 'inside' or, for programs,"
            " 'inputs')"
        )
    if (request.gguf is not None or request.quantized) and (to, adapters) != ("gguf", "merged"):
        raise ExportError("gguf= and quantized= are for to='gguf', adapters='merged'")
    if program.merged and adapters in ("inside", "inputs"):
        raise ExportError(f"{', '.join(program.merged)} merged: unmerge_adapter() first, or export adapters='merged'")
    slashed = [name for name in program.adapters if "/" in name]
    if slashed and adapters in ("inputs", "beside"):
        raise ExportError(f"{slashed[0]!r}: its file can't have a name with a slash; load it under another name")
    if adapters == "inside":
        _refuse_asking(program)
    if to == "hf" and adapters != "merged":
        raise ExportError(
            "to='hf': a transformers checkpoint has no place for adapters; save_pretrained writes them beside it, or export"
            " adapters='merged'"
        )
    if to == "hf" and not is_pretrained(program.base):
        raise ExportError(
            f"to='hf': {original_class(program.base).__name__} is no model of transformers; merge_and_unload() and save its"
            " state dict"
        )
    if request.generation and to not in PROGRAMS:
        raise ExportError(f"to={to!r}: generation=True is for programs ({', '.join(PROGRAMS)})")
    _require_sizes(request)
    if request.tokenizer is not None and not request.generation:
        raise ExportError("tokenizer= goes beside what generates: give generation=True, too")
    require_packages(to)
    if to == "aoti":
        require_compiler()


def _require_sizes(request: Request) -> None:
    if request.sizes not in get_args(Sizes) or (
        request.sizes == "fixed" and (request.generation or request.to not in PROGRAMS)
    ):
        raise ExportError(
            f"sizes={request.sizes!r}: valid are {', '.join(get_args(Sizes))}; fixed is for programs"
            f" ({', '.join(PROGRAMS)}), without generation"
        )


def _refuse_asking(program: Program) -> None:
    """Raise ExportError if an active adapter asks about the model's call: the inputs of a program are the base's."""
    adapters = {name: program.adapters[name] for name in program.spliced}
    asking = [
        name
        for name, own in adapters.items()
        if any(one.needed for one, _ in own.arguments.values()) or any(begins(edit.rule) for edit in own.edits)
    ]
    if asking:
        raise ExportError(
            f"{asking[0]!r} asks about the model's call, of which a program only has what the base takes: serve it as a"
            " compiled model"
        )


def _require_base(request: Request) -> None:
    if request.gguf is None:
        raise ExportError(
            "to='gguf', adapters='merged': give gguf=, the base's own GGUF file, whose tokenizer and other tensors are"
            " kept. Without one: export(folder) writes the merged checkpoint for llama.cpp's converter, adapters='beside'"
            " the adapter alone"
        )


def require_packages(to: str) -> None:
    """Raise ExportError, naming the extra, if a package is missing that files for this runtime are made or run with."""
    missing = [name for name in _PACKAGES.get(to, ()) if find_spec(name) is None]
    if missing:
        raise ExportError(f"to={to!r} needs {', '.join(missing)}: pip install 'peftc[export]'")


def require_captured(program: Program, given: Mapping[str, Tensor]) -> None:
    """Raise ExportError if the model is a program that takes other inputs."""
    signature = program.regions[0].source.signature if program.plan.capture == "export" and program.regions else None
    if signature is not None and not signature.takes(given):
        raise ExportError(
            f"the model was captured with {', '.join(signature.names)} and is to be exported with {', '.join(given)}. Give"
            " inputs= of these names, or load the adapter with capture='modules' and export that."
        )
