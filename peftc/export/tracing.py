"""Programs by torch.export, with an adapter's factors as inputs if they are to be; compiled, or as ONNX."""

import inspect
import io
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.func import functional_call

from peftc.errors import ExportError
from peftc.graph.exported import exportable
from peftc.rewrite.hosts import original_class


@dataclass(frozen=True)
class Template:
    """The adapter that is exported: by input, the live parameter's name in the model, its axis of the rank, its dtype."""

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    axes: Mapping[str, int] = field(default_factory=dict[str, int])
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])

    def call(self, model: nn.Module, factors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Any:
        """What the model gives with the factors of `factors` in the place of the live ones."""
        return functional_call(model, {path: factors[name] for name, path in self.parameters.items()}, (), dict(given))


# For programs whose adapters are in them.
NOTHING = Template()


class Named(nn.Module):
    """A function of tensors by name, with a signature that says so."""

    def __init__(self, model: nn.Module, function: Callable[[Mapping[str, Tensor]], Any], names: Sequence[str]) -> None:
        super().__init__()
        self.model = model

        def forward(**given: Tensor) -> Any:
            return function(given)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def program_of(
    model: nn.Module,
    made: Template,
    function: Callable[[Mapping[str, Tensor]], Any],
    given: Mapping[str, Tensor],
    sizes: Mapping[str, Mapping[int, Any]],
    to: str,
) -> Any:
    """The torch.export program of `function`, which calls `model`, of the inputs `given` and the factors of `made`.

    `sizes`: which sizes of the inputs are open, the others are fixed. `to`: what it will be written as. Raises ExportError.
    """
    factors = {name: model.get_parameter(path).detach().clone() for name, path in made.parameters.items()}
    fixed: dict[str, Any] = dict.fromkeys(given)
    open_axes = {name: {axis: torch.export.Dim.AUTO} for name, axis in made.axes.items()}
    named = Named(model, function, [*given, *factors])
    with torch.no_grad(), exportable(model, *(("onnx",) if to == "onnx" else ())):
        try:
            return without_unused(
                torch.export.export(
                    named, (), {**given, **factors}, dynamic_shapes={**fixed, **sizes, **open_axes}, strict=False
                )
            )
        except Exception as error:  # Whatever tracing raises, of models that it can't take.
            raise ExportError(f"{original_class(model).__name__} can't be exported: {first(error)}") from error


def without_unused(program: Any) -> Any:
    """The same program without the tensors of the model that nothing reads: those of adapters that are merged, or not
    active. torch.export keeps all.
    """
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    signature, graph = program.graph_signature, program.graph
    unread = {node.name: node for node in graph.find_nodes(op="placeholder") if not node.users}
    gone = [spec for spec in signature.input_specs if spec.kind in kinds and spec.arg.name in unread]
    left = {spec.arg.name for spec in gone}
    signature.input_specs = [spec for spec in signature.input_specs if spec.arg.name not in left]
    read = {spec.target for spec in signature.input_specs}
    for spec in gone:
        graph.erase_node(unread[spec.arg.name])
        for tensors in (program.state_dict, program.constants) if spec.target not in read else ():
            tensors.pop(spec.target, None)
    program.graph_module.recompile()
    return program


def open_sizes(given: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """All sizes of these inputs as torch.export is told that they are open, as far as the model leaves them so."""
    return {name: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) for name, value in given.items()}


def guards_of(program: Any) -> tuple[str, ...]:
    """What a trace took for true of the sizes of its inputs, as torch writes it."""
    return tuple(program._guards_code or ())


def require_compiler() -> None:
    """Raise ExportError if there is no C++ compiler, which AOTInductor needs."""
    builder: Any = import_module("torch._inductor.cpp_builder")
    try:
        builder.get_cpp_compiler()
    except Exception as error:  # Inductor's own, of several classes.
        raise ExportError(
            f"to='aoti' needs a C++ compiler (g++, or what CXX names), and there is none: {type(error).__name__}. to='pt2'"
            " needs none"
        ) from None


def write_compiled(program: Any, path: Path) -> None:
    """Compile a program by AOTInductor, for this kind of machine. Raises ExportError."""
    try:
        import_module("torch._inductor").aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # Inductor's own, or what the compiler says.
        raise ExportError(f"to='aoti': the program can't be compiled: {first(error)}") from error


def onnx_of(program: Any, outputs: Sequence[str] | None) -> Any:
    """The program in ONNX's ops, with transformers' translations of theirs, if that is there. Raises ExportError."""
    theirs: Any = (
        import_module("transformers.exporters.exporter_onnx") if find_spec("transformers") is not None else None
    )
    table = theirs._ONNX_TRANSLATION_TABLE if theirs is not None else None
    try:
        if theirs is not None:
            theirs.apply_fx_node_fixes("onnx", program.graph_module)
        written: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, output_names=outputs, custom_translation_table=table
        )
    except Exception as error:  # What has no ONNX operator.
        raise ExportError(f"the program can't be written as ONNX: {first(error)[:300]}") from error
    if theirs is not None:
        theirs.apply_onnx_ir_fixes(written)
    return written


def first(error: BaseException) -> str:
    """The class of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextmanager
def quiet() -> Generator[None]:
    """A context without the warnings of exporters, and what they print of their progress."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def quiet_session() -> Any:
    """onnxruntime's options without its log: what is refused raises, and is tried on purpose."""
    options = import_module("onnxruntime").SessionOptions()
    options.log_severity_level = 4
    return options
