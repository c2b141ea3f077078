"""The exporters of whole models, each with what runs the files that it wrote: transformers' own, and torch's."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import ExportError
from peftc.export.certificate import tensors_of
from peftc.export.tracing import NOTHING, first, program_of, quiet, write_compiled
from peftc.graph.sites import is_pretrained
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program

# What torch.export's own programs are called, of models that are not of transformers; and compiled ones.
PLAIN = "model.pt2"
COMPILED = "compiled.pt2"

Run = Callable[[Mapping[str, Tensor]], Any]


def _checkpoint(program: Program, stage: Path, given: Mapping[str, Tensor]) -> Run:
    """A transformers checkpoint of the merged model."""
    base: Any = program.base
    own = {name: tensor for name, tensor in base.state_dict().items() if not _is_added(program, name)}
    base.save_pretrained(stage, state_dict=own)

    model: Any = cast(Any, original_class(base)).from_pretrained(stage).eval()
    return lambda inputs: model(**inputs)


def _is_added(program: Program, name: str) -> bool:
    return any(part in program.children for part in name.split("."))


def _program(program: Program, stage: Path, given: Mapping[str, Tensor]) -> Run:
    """A torch.export program."""
    if not is_pretrained(program.base):
        return _plain_program(program.base, stage, given)
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    return _exported(program, stage, given, DynamoExporter(), DynamoConfig(dynamic=True))


def _onnx(program: Program, stage: Path, given: Mapping[str, Tensor]) -> Run:
    """An ONNX model."""
    if not is_pretrained(program.base):
        return _plain_onnx(program.base, stage, given)
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    return _exported(program, stage, given, OnnxExporter(), OnnxConfig(dynamic=True))


def _exported(program: Program, stage: Path, given: Mapping[str, Tensor], exporter: Any, config: Any) -> Run:
    """What one of transformers' exporters makes, in its own folder format, which it also runs."""
    base: Any = program.base
    with quiet():
        try:
            exporter.export(base, dict(given), config).save_pretrained(stage)
        except Exception as error:  # Whatever tracing raises, of models that it can't take.
            raise ExportError(
                f"{original_class(base).__name__} can't be exported by {type(exporter).__name__}: {first(error)}"
            ) from error
    return loaded(stage)


def loaded(folder: Path) -> Run:
    """What runs the program of a transformers model in `folder`, loaded once."""
    from transformers.exporters.base import ExportedModel

    exported: Any = ExportedModel.from_pretrained(str(folder))
    return lambda inputs: exported(**inputs)


def _plain_program(model: nn.Module, stage: Path, given: Mapping[str, Tensor]) -> Run:
    batched = {name: {0: torch.export.Dim.AUTO} for name in given}
    try:
        made = torch.export.export(model, (), dict(given), dynamic_shapes=batched)
    except Exception as error:  # A user's forward may raise anything while it is traced.
        raise ExportError(f"{original_class(model).__name__} can't be exported: {first(error)}") from error
    torch.export.save(made, stage / PLAIN)
    return lambda inputs: torch.export.load(stage / PLAIN).module()(**inputs)


def _plain_onnx(model: nn.Module, stage: Path, given: Mapping[str, Tensor]) -> Run:
    batched = {name: {0: torch.export.Dim.AUTO} for name in given}
    path = stage / "model.onnx"
    with quiet():
        try:
            torch.onnx.export(
                model, (), str(path), kwargs=dict(given), dynamic_shapes=batched, dynamo=True, verbose=False
            )
        except Exception as error:  # As above; and what has no ONNX operator.
            raise ExportError(f"{original_class(model).__name__} can't be exported: {first(error)}") from error
    return lambda inputs: run_onnx(path, inputs)


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...] | Tensor:
    """The outputs of an ONNX model of one's own module; the only one, or a tuple."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made = session.run(None, {name: value.detach().cpu().numpy() for name, value in inputs.items()})
    outputs = tuple(torch.from_numpy(value) for value in made)
    return outputs[0] if len(outputs) == 1 else outputs


def _compiled(program: Program, stage: Path, given: Mapping[str, Tensor]) -> Run:
    """A program compiled by AOTInductor, of tensors by name to tensors by name."""
    base = program.base
    taken = inspect.signature(original_class(base).forward).parameters
    more = {"use_cache": False} if "use_cache" in taken and program.plan.capture == "modules" else {}
    with quiet():
        traced = program_of(
            base,
            NOTHING,
            lambda tensors: tensors_of(base(**tensors, **more)),
            given,
            {name: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) for name, value in given.items()},
            "aoti",
        )
        write_compiled(traced, stage / COMPILED)
    return run_compiled(stage / COMPILED)


def run_compiled(path: Path) -> Run:
    """What runs a compiled program, loaded once."""
    program: Any = import_module("torch._inductor").aoti_load_package(str(path))
    return lambda inputs: program(**inputs)


EXPORTERS: Mapping[str, Callable[..., Run]] = {"hf": _checkpoint, "pt2": _program, "onnx": _onnx, "aoti": _compiled}
