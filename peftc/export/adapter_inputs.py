"""One program, any number of adapters beside it: the factors are inputs, of any rank, that may be left out.

`onnx`: onnxruntime's own adapter files (`AdapterFormat`, `RunOptions.add_active_adapter`); without one, the factors have
rank 0 and the program is the base. `pt2`, `aoti`: safetensors with the inputs by name; factors of zeros for the base.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import lifecycle
from peftc.checkpoint.save import config_of
from peftc.checkpoint.serving import serving_form
from peftc.checkpoint.state import key_of
from peftc.errors import CheckpointError, ExportError
from peftc.export.certificate import tensors_of
from peftc.export.exporters import COMPILED, run_compiled
from peftc.export.tracing import Template, onnx_of, open_sizes, program_of, quiet_session, write_compiled
from peftc.merge.combine import target_names
from peftc.registry import spec_classes
from peftc.rewrite.program import Program
from peftc.rewrite.switch import activate, emit
from peftc.specs import load_spec

# The adapter that the program is made with, whose factors become inputs.
_TEMPLATE = "exported_inputs"
_PREFIX = "base_model.model."
ADAPTERS = "adapters"
NO_ADAPTER = "no_adapter.safetensors"
_LEAST_RANK = 2  # What a trace takes for the least.


def input_names(keys: Iterable[str]) -> dict[str, str]:
    """What inputs are called, by the keys of their tensors in PEFT's files; each has a name of its own."""
    found: dict[str, str] = {}
    for key in sorted(keys):
        name = key.removeprefix(_PREFIX).removesuffix(".weight").replace(".", "_").lower()
        name = name if name.isidentifier() else f"module_{name}"
        taken = set(found.values())
        # Names are equal where keys differ in case, or have `_` for `.`.
        found[key] = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return found


def adapter_tensors(program: Program) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """By adapter, its factors by PEFT's key, with the scaling in them; and a config that has all their sites.

    Raises ExportError for adapters that are no such factors.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    config: dict[str, Any] = {}
    for name in program.adapters:
        try:
            config, own = serving_form(program, name, config_of(program, name), least_rank=_LEAST_RANK)
        except CheckpointError as error:
            raise ExportError(f"adapters='inputs': {error} adapters='merged' takes anything.") from None
        tensors[name] = {key: tensor.detach().cpu().contiguous() for key, tensor in own.items()}
    sites = list(dict.fromkeys(edit.site for adapter in program.adapters.values() for edit in adapter.edits))
    return tensors, {**config, "target_modules": list(target_names(program.base, sites))}


@contextmanager
def template(program: Program, config: Mapping[str, Any], names: Mapping[str, str]) -> Generator[Template]:
    """A context in which an adapter with all sites of `config` is the active one; all is as it was afterwards.

    `names`: of the inputs, by key.
    """
    active, learning, enabled = program.active, program.learning, program.enabled
    lifecycle.add(program, _TEMPLATE, load_spec(dict(config), spec_classes()), "error")
    try:
        program.enabled = True
        activate(program, [_TEMPLATE], [])
        named = {id(parameter): name for name, parameter in program.base.named_parameters()}
        adapter = program.adapters[_TEMPLATE]
        parameters: dict[str, str] = {}
        axes: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        for edit in adapter.edits:
            for axis, param in enumerate(param for param in edit.params if param.trainable):
                name, tensor = names[key_of(adapter.spec, edit, param)], adapter.tensor(edit, param.key)
                parameters[name], axes[name], dtypes[name] = named[id(tensor)], axis, tensor.dtype
        yield Template(parameters, axes, dtypes)
    finally:
        program.enabled = enabled
        activate(program, active, learning)
        lifecycle.delete(program, _TEMPLATE)
        emit(program)


def traced(
    model: nn.Module, made: Template, given: Mapping[str, Tensor], more: Mapping[str, Any], to: str, fixed: bool
) -> Any:
    """The torch.export program of `model` with factors as inputs, to be written as `to`.

    `more`: what else every call has. `fixed`: inputs are to have the sizes given. Raises ExportError.
    """

    def call(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return tensors_of(made.call(model, tensors, {**{name: tensors[name] for name in given}, **more}))

    return program_of(model, made, call, given, {} if fixed else open_sizes(given), to)


def write_pt2(program: Any, made: Template, outputs: Sequence[str], tensors: Mapping[str, Any], stage: Path) -> None:
    """`model.pt2`, and the inputs of every adapter as safetensors."""
    torch.export.save(program, stage / "model.pt2")
    write_adapters(tensors, stage)


def write_onnx(program: Any, made: Template, outputs: Sequence[str], tensors: Mapping[str, Any], stage: Path) -> None:
    """`model.onnx`, whose factors have rank 0 unless they are given, and an `.onnx_adapter` for every adapter."""
    refuse_bfloat16(made)
    onnx = import_module("onnx")
    model = with_defaults(onnx_of(program, outputs).model_proto, made)
    onnx.save(model, stage / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    write_onnx_adapters(tensors, stage)


def refuse_bfloat16(made: Template) -> None:
    """Raise ExportError for factors that onnxruntime's adapters can't have."""
    if torch.bfloat16 in made.dtypes.values():
        raise ExportError(
            "adapters='inputs': numpy has no bfloat16 for the factors. Compile with autocast_adapter_dtype=True, which"
            " keeps adapters in float32."
        )


def with_defaults(model: Any, made: Template) -> Any:
    """An ONNX model whose factors have rank 0 unless they are given."""
    onnx = import_module("onnx")
    for entry in model.graph.input:
        axis = made.axes.get(entry.name)
        if axis is not None:
            sizes = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
            sizes[axis] = 0
            empty = torch.zeros(sizes, dtype=made.dtypes[entry.name]).numpy()
            model.graph.initializer.append(onnx.numpy_helper.from_array(empty, entry.name))
    return model


def write_adapters(tensors: Mapping[str, Any], stage: Path) -> None:
    """`adapters/<name>.safetensors` for every adapter: its inputs by name."""
    (stage / ADAPTERS).mkdir()
    for name, own in tensors.items():
        save_file(own, stage / ADAPTERS / f"{name}.safetensors")


def write_onnx_adapters(tensors: Mapping[str, Any], stage: Path) -> None:
    """`adapters/<name>.onnx_adapter` for every adapter, in onnxruntime's form."""
    runtime: Any = import_module("onnxruntime")
    (stage / ADAPTERS).mkdir()
    for name, own in tensors.items():
        form = runtime.AdapterFormat()
        form.set_adapter_version(1)
        form.set_model_version(1)
        values = {key: runtime.OrtValue.ortvalue_from_numpy(value.numpy()) for key, value in own.items()}
        form.set_parameters(values)
        form.export_adapter(str(stage / ADAPTERS / f"{name}.onnx_adapter"))


def write_aoti(program: Any, made: Template, outputs: Sequence[str], tensors: Mapping[str, Any], stage: Path) -> None:
    """`compiled.pt2`, the inputs of every adapter as safetensors, and those of none, zeros, as `no_adapter.safetensors`."""
    write_compiled(program, stage / COMPILED)
    write_adapters(tensors, stage)
    traced = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    zeros = {
        name: torch.zeros(
            [_LEAST_RANK if at == axis else size for at, size in enumerate(traced[name].shape)], dtype=made.dtypes[name]
        )
        for name, axis in made.axes.items()
    }
    save_file(zeros, stage / NO_ADAPTER)


WRITERS: Mapping[str, Callable[..., None]] = {"pt2": write_pt2, "onnx": write_onnx, "aoti": write_aoti}


# An adapter's name (None: the base) and inputs to outputs by name.
Run = Callable[[str | None, Mapping[str, Tensor]], dict[str, Tensor]]


def with_adapters(folder: Path) -> Run:
    """What runs the program in `folder` with one of its adapters, or as the base; loaded once."""
    if (folder / "model.onnx").exists():
        return _onnx_run(folder)
    return _aoti_run(folder) if (folder / COMPILED).exists() else _pt2_run(folder)


def _aoti_run(folder: Path) -> Run:
    program, zeros = run_compiled(folder / COMPILED), load_file(folder / NO_ADAPTER)

    def run(adapter: str | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factors = load_file(folder / ADAPTERS / f"{adapter}.safetensors") if adapter is not None else {}
        return tensors_of(program({**inputs, **zeros, **factors}))

    return run


def _pt2_run(folder: Path) -> Run:
    program: Any = torch.export.load(folder / "model.pt2")
    module = program.module()
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    zeros: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in users:
            sizes = [int(str(size)) if str(size).isdigit() else 2 for size in node.meta["val"].shape]
            zeros[node.name] = torch.zeros(sizes, dtype=node.meta["val"].dtype)

    def run(adapter: str | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factors = load_file(folder / ADAPTERS / f"{adapter}.safetensors") if adapter is not None else {}
        return tensors_of(module(**{name: {**zeros, **inputs, **factors}[name] for name in users}))

    return run


def _onnx_run(folder: Path) -> Run:
    runtime: Any = import_module("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"), quiet_session(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(adapter: str | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen, own = runtime.RunOptions(), runtime.LoraAdapter()
        if adapter is not None:
            own.Load(str(folder / ADAPTERS / f"{adapter}.onnx_adapter"))
            chosen.add_active_adapter(own)
        made = session.run(names, {name: value.detach().cpu().numpy() for name, value in inputs.items()}, chosen)
        return {name: torch.from_numpy(value) for name, value in zip(names, made, strict=True)}

    return run
