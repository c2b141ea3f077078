"""The exporters of whole models, each with what runs the files that it wrote: transformers' own, and torch's."""

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import ExportError
from peftc.export.certificate import tensors_of
from peftc.export.tracing import (
    NOTHING,
    first,
    guards_of,
    onnx_of,
    open_sizes,
    program_of,
    quiet,
    quiet_session,
    without_unused,
    write_compiled,
)
from peftc.graph.sites import is_pretrained
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program

# What torch.export's own programs are called, of models that are not of transformers; and compiled ones.
PLAIN = "model.pt2"
COMPILED = "compiled.pt2"

Run = Callable[[Mapping[str, Tensor]], Any]


@dataclass(frozen=True)
class Written:
    """What runs an artefact, and what its trace took for true of the sizes of inputs, as torch writes it; of a checkpoint,
    which has its Python, nothing.
    """

    run: Run
    guards: tuple[str, ...] = ()
    traced: bool = True


def _checkpoint(program: Program, stage: Path, given: Mapping[str, Tensor], fixed: bool) -> Written:
    """A transformers checkpoint of the merged model."""
    base: Any = program.base
    own = {name: tensor for name, tensor in base.state_dict().items() if not _is_added(name, program.children)}
    base.save_pretrained(stage, state_dict=own)

    model: Any = cast(Any, original_class(base)).from_pretrained(stage).eval()
    return Written(lambda inputs: model(**inputs), traced=False)


def _is_added(name: str, children: Container[str]) -> bool:
    return any(part in children for part in name.split("."))


def _program(program: Program, stage: Path, given: Mapping[str, Tensor], fixed: bool) -> Written:
    """A torch.export program."""
    if not is_pretrained(program.base):
        traced = _plain(program.base, given, fixed)
        torch.export.save(traced, stage / PLAIN)
        module = torch.export.load(stage / PLAIN).module()
        return Written(lambda inputs: module(**inputs), guards_of(traced))
    from transformers.exporters.configs import DynamoConfig

    return _exported(program.base, stage, given, _recording("Dynamo"), DynamoConfig(dynamic=not fixed))


def _onnx(program: Program, stage: Path, given: Mapping[str, Tensor], fixed: bool) -> Written:
    """An ONNX model."""
    if not is_pretrained(program.base):
        path = stage / "model.onnx"
        with quiet():
            traced = _plain(program.base, given, fixed)
            onnx_of(traced, None).save(path, external_data=True)
        return Written(run_onnx(path), guards_of(traced))
    from transformers.exporters.configs import OnnxConfig

    return _exported(program.base, stage, given, _recording("Onnx"), OnnxConfig(dynamic=not fixed))


def _recording(name: str) -> Any:
    """transformers' exporter of this name, which keeps what it has traced in its attribute `traced`."""
    base: Any = import_module("transformers.exporters.exporter_dynamo").DynamoExporter

    class Recorded(base):
        traced: Any = None

        def export_program(self, *args: Any, **kwargs: Any) -> Any:
            program, metadata = super().export_program(*args, **kwargs)
            self.traced = without_unused(program)
            return self.traced, metadata

    if name == "Dynamo":
        return Recorded()
    theirs: Any = import_module("transformers.exporters.exporter_onnx").OnnxExporter
    # The ONNX exporter asks its super class for the program, which is the recording one then.
    return type("Recorded", (theirs, Recorded), {})()


def _exported(base: nn.Module, stage: Path, given: Mapping[str, Tensor], exporter: Any, config: Any) -> Written:
    """What one of transformers' exporters makes, in its own folder format, which it also runs."""
    with quiet():
        try:
            exporter.export(base, dict(given), config).save_pretrained(stage)
        except Exception as error:  # Whatever tracing raises, of models that it can't take.
            raise ExportError(
                f"{original_class(base).__name__} can't be exported by {exporter.export_format}: {first(error)}"
            ) from error
    return Written(loaded(stage), guards_of(exporter.traced))


def loaded(folder: Path) -> Run:
    """What runs the program of a transformers model in `folder`, loaded once."""
    from transformers.exporters.base import ExportedModel

    more = {"session_options": quiet_session()} if (folder / "model.onnx").exists() else {}
    exported: Any = ExportedModel.from_pretrained(str(folder), **more)
    return lambda inputs: exported(**inputs)


def _plain(model: nn.Module, given: Mapping[str, Tensor], fixed: bool) -> Any:
    try:
        made = torch.export.export(model, (), dict(given), dynamic_shapes=None if fixed else open_sizes(given))
    except Exception as error:  # A user's forward may raise anything while it is traced.
        raise ExportError(f"{original_class(model).__name__} can't be exported: {first(error)}") from error
    return without_unused(made)


def run_onnx(path: Path) -> Run:
    """What runs an ONNX model of one's own module, loaded once: its only output, or a tuple."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), quiet_session(), providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...] | Tensor:
        made = session.run(None, {name: value.detach().cpu().numpy() for name, value in inputs.items()})
        outputs = tuple(torch.from_numpy(value) for value in made)
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _compiled(program: Program, stage: Path, given: Mapping[str, Tensor], fixed: bool) -> Written:
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
            {} if fixed else open_sizes(given),
            "aoti",
        )
        write_compiled(traced, stage / COMPILED)
    return Written(run_compiled(stage / COMPILED), guards_of(traced))


def run_compiled(path: Path) -> Run:
    """What runs a compiled program, loaded once."""
    program: Any = import_module("torch._inductor").aoti_load_package(str(path))
    return lambda inputs: program(**inputs)


EXPORTERS: Mapping[str, Callable[..., Written]] = {"hf": _checkpoint, "pt2": _program, "onnx": _onnx, "aoti": _compiled}
