"""Exporting a model with its adapters: a transformers checkpoint, a torch.export program, an ONNX model.

transformers' own exporters and torch's do the work; here is what becomes of the adapters, that nothing is half written
and the live model is as it was, and the comparison of what came out with it.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from peftc.checkpoint.atomic import staged
from peftc.choices import Adapters, Target
from peftc.errors import ExportError, MergeError
from peftc.export.adapter_files import write_adapter
from peftc.export.adapter_inputs import WRITERS as INPUT_WRITERS
from peftc.export.adapter_inputs import adapter_tensors, input_names, run_with_adapter, template, traced
from peftc.export.certificate import Certificate, difference, hashes, sources, tensors_of, versions
from peftc.graph.sites import is_pretrained
from peftc.merge import merge, unmerge
from peftc.progress import Tick, bar
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program, require_idle
from peftc.rewrite.switch import activate

# What becomes of the adapters, if nothing else is asked for.
_DEFAULT: Mapping[str, Adapters] = {
    "hf": "merged",
    "pt2": "merged",
    "onnx": "merged",
    "gguf": "beside",
    "mlx": "beside",
}
_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "gguf": ("gguf",)}
_TOKENS = 8  # That are compared.
# What torch.export's own programs are called, of models that are not of transformers.
PLAIN = "model.pt2"
_HEADS = ("config.json", "export.json", "certificate.json")
_STEPS = ("what the live model computes", "writing", "comparing")
_LOG = logging.getLogger(__name__)


def export(
    program: Program,
    folder: Path,
    to: Target,
    adapters: Adapters | None,
    inputs: Mapping[str, Tensor] | None,
    generation: bool,
    progress: bool = True,
) -> Certificate:
    """Write the model to `folder` and compare what was written with it; see `CompiledModel.export`."""
    adapters = _DEFAULT.get(to, "merged") if adapters is None else adapters
    _require(program, to, adapters, generation)
    begin = perf_counter()
    with bar(f"export to {to}", len(_STEPS), "steps", progress) as tick:
        if adapters == "beside":
            certificate = _beside(program, folder, to, tick)
        else:
            given = _inputs(program.base, inputs)
            _require_captured(program, given)
            if adapters == "inputs":
                certificate = _as_inputs(program, folder, to, given, tick)
            else:
                certificate = _whole(program, folder, to, adapters, given, generation, tick)
        tick()
    _LOG.info("exported to %s in %.2f s: %s", folder, perf_counter() - begin, certificate)
    return certificate


def _whole(
    program: Program,
    folder: Path,
    to: Target,
    adapters: Adapters,
    given: Mapping[str, Tensor],
    generation: bool,
    tick: Tick,
) -> Certificate:
    """A model that needs nothing else, with the adapters merged or as the ops that they are."""
    live, writing, comparing = _STEPS
    with _for_inference(program.base):
        tick(0, live)
        expected = tensors_of(program.base(**given))
        if not expected:
            raise ExportError(f"{type(program.base).__name__} gives no tensors for {sorted(given)}: nothing to compare")
        names = program.merged or program.spliced
        made_from = sources(program, names)
        tokens = _greedy(lambda ids: program.base(**ids), program.base, given)
        tick(1, writing)
        with _merged(program, adapters), staged(folder, _HEADS) as stage:
            run = _EXPORTERS[to](program, stage, given, generation)
            tick(1, comparing)
            largest, scale = difference(tensors_of(run(given)), expected)
            try:
                made = _greedy(run, program.base, given)
            except Exception as error:  # Of any runtime.
                raise ExportError(
                    f"to={to!r}: what was written does not run on other lengths than it was traced with: {_first(error)}"
                ) from error
            certificate = Certificate(
                to,
                adapters,
                names,
                largest,
                scale,
                *_agreement(made, tokens),
                hashes(stage),
                versions(),
                sources=made_from,
            )
            certificate.write(stage, given, expected)
    return certificate


def _beside(program: Program, folder: Path, to: Target, tick: Tick) -> Certificate:
    """Every active adapter as a file of its own, for a base that the runtime has."""
    if not program.spliced:
        raise ExportError(f"to={to!r}: no adapter is active and unmerged, so there is nothing to write")
    tick(1, _STEPS[1])
    with staged(folder, _HEADS) as stage:
        found = [write_adapter(program, name, to, stage) for name in program.spliced]
        tick(1, _STEPS[2])
        largest, scale = (max(numbers) for numbers in zip(*found, strict=True))
        certificate = Certificate(
            to, "beside", program.spliced, largest, scale, None, None, hashes(stage), versions(), of="weight changes"
        )
        certificate = replace(certificate, sources=sources(program, program.spliced))
        certificate.write(stage, {}, {})
    return certificate


def _as_inputs(program: Program, folder: Path, to: Target, given: Mapping[str, Tensor], tick: Tick) -> Certificate:
    """One program whose factors are inputs, and a file for every adapter."""
    live, writing, comparing = _STEPS
    taken = inspect.signature(original_class(program.base).forward).parameters
    # A program takes no more than it was captured with.
    more = {"use_cache": False} if "use_cache" in taken and program.plan.capture != "export" else {}
    with _for_inference(program.base):
        tick(0, live)
        expected = {name: _live(program, name, given, more) for name in program.adapters}
        made_from = sources(program, list(expected))
        by_key, config = adapter_tensors(program)
        names_of = input_names({key for own in by_key.values() for key in own})
        tick(1, writing)
        with staged(folder, _HEADS) as stage:
            with template(program, config, names_of) as made, _quiet():
                whole = traced(program.base, made, given, more, to)
                tensors = {
                    name: {names_of[key]: value.to(made.dtypes[names_of[key]]) for key, value in own.items()}
                    for name, own in by_key.items()
                }
                INPUT_WRITERS[to](whole, made, list(next(iter(expected.values()))), tensors, stage)
            tick(1, comparing)
            found = [difference(run_with_adapter(stage, name, given), outputs) for name, outputs in expected.items()]
            largest, scale = (max(numbers) for numbers in zip(*found, strict=True))
            names = tuple(expected)
            certificate = Certificate(
                to, "inputs", names, largest, scale, None, None, hashes(stage), versions(), sources=made_from
            )
            certificate.write(stage, given, expected[names[0]])
    return certificate


def _live(program: Program, name: str, given: Mapping[str, Tensor], more: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model computes with one adapter."""
    active, learning, enabled = program.active, program.learning, program.enabled
    try:
        program.enabled = True
        activate(program, [name], [])
        return tensors_of(program.base(**given, **more))
    finally:
        program.enabled = enabled
        activate(program, active, learning)


def _greedy(run: "Run", model: nn.Module, given: Mapping[str, Tensor]) -> list[int] | None:
    """The next tokens of the first row, each from a call of its own; None of models that generate none from ids alone."""
    config: Any = getattr(model, "config", None)
    generates = is_pretrained(model) and cast(Any, model).can_generate()
    if not generates or config.is_encoder_decoder or not set(given) <= {"input_ids", "attention_mask"}:
        return None
    ids, tokens = given["input_ids"].expand(2, -1) if len(given["input_ids"]) == 1 else given["input_ids"], list[int]()
    for _ in range(_TOKENS):
        inputs = {name: ids if name == "input_ids" else torch.ones_like(ids) for name in given}
        next_ids = tensors_of(run(inputs))["logits"][:, -1].argmax(-1, keepdim=True)
        tokens.append(int(next_ids[0]))
        ids = torch.cat([ids, next_ids.to(ids.device)], 1)
    return tokens


def _agreement(one: list[int] | None, other: list[int] | None) -> tuple[int | None, int | None]:
    """How many tokens there are, and how many are the same before the first that is not."""
    if one is None or other is None:
        return None, None
    parts = next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    return len(one), parts


def _require(program: Program, to: str, adapters: str, generation: bool) -> None:
    """Raise ExportError for what can't be, before anything is done."""
    require_idle(program)
    if to not in get_args(Target) or adapters not in get_args(Adapters):
        raise ExportError(
            f"to={to!r}, adapters={adapters!r}: valid are {', '.join(get_args(Target))};"
            f" {', '.join(get_args(Adapters))}"
        )
    if (adapters == "beside") != (_DEFAULT[to] == "beside"):
        raise ExportError(
            f"to={to!r}, adapters={adapters!r}: gguf and mlx take adapters beside a base (adapters='beside'), hf, pt2 and"
            " onnx are whole models (adapters='merged', 'inside' or 'inputs')"
        )
    if program.merged and adapters == "inside":
        raise ExportError(f"{', '.join(program.merged)} merged: unmerge_adapter() first, or export adapters='merged'")
    if adapters == "inputs" and program.merged:
        raise ExportError(f"{', '.join(program.merged)} merged: unmerge_adapter() first")
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
    if generation and (to == "hf" or not is_pretrained(program.base)):
        raise ExportError("generation=True is for programs (pt2, onnx) of transformers' generative models")
    require_packages(to)


def require_packages(to: str) -> None:
    """Raise ExportError, naming the extra, if a package is missing that files for this runtime are made or run with."""
    missing = [name for name in _PACKAGES.get(to, ()) if find_spec(name) is None]
    if missing:
        raise ExportError(f"to={to!r} needs {', '.join(missing)}: pip install 'peftc[export]'")


def _require_captured(program: Program, given: Mapping[str, Tensor]) -> None:
    """Raise ExportError if the model is a program that takes other inputs."""
    signature = program.regions[0].source.signature if program.plan.capture == "export" and program.regions else None
    if signature is not None and set(signature.names) != set(given):
        raise ExportError(
            f"the model was captured with {', '.join(signature.names)} and is to be exported with {', '.join(given)}. Give"
            " inputs= of these names, or load the adapter with capture='modules' and export that."
        )


def _inputs(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Inputs to trace and compare with: those given, or ids for models that take them. Raises ExportError."""
    if inputs is not None:
        given: dict[str, Any] = dict(inputs)
        wrong = [name for name, value in given.items() if not isinstance(value, Tensor)]
        if wrong or not given:
            raise ExportError(f"inputs: expected tensors by name, as the model is called with, got {wrong or given}")
        return given
    taken = inspect.signature(original_class(model).forward).parameters
    if "input_ids" not in taken:
        raise ExportError(
            f"inputs: {original_class(model).__name__} takes {', '.join(list(taken)[1:5])}, …; give tensors by name, two"
            " rows at least"
        )
    config: Any = getattr(model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 0) or 100)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 8), generator=generator).to(next(model.parameters()).device)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids[:, :4].contiguous()
    return {name: value for name, value in made.items() if name in taken}


@contextmanager
def _for_inference(model: nn.Module) -> Generator[None]:
    """The model in eval() and without gradients, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _merged(program: Program, adapters: Adapters) -> Generator[None]:
    """A context in which active adapters are merged, if they are to be, and the weights have their bits again after it."""
    if adapters == "inside" or program.merged or not program.spliced:
        yield
        return
    try:
        merge(program, program.spliced, untie=True, undo="keep")
    except MergeError as error:
        raise ExportError(
            f"adapters='merged': {error} adapters='inside' exports the model with its adapters."
        ) from None
    try:
        yield
    finally:
        unmerge(program, check=False)


Run = Callable[[Mapping[str, Tensor]], Any]


def _checkpoint(program: Program, stage: Path, given: Mapping[str, Tensor], generation: bool) -> Run:
    """A transformers checkpoint of the merged model."""
    base: Any = program.base
    own = {name: tensor for name, tensor in base.state_dict().items() if not _is_added(program, name)}
    base.save_pretrained(stage, state_dict=own)

    model: Any = cast(Any, original_class(base)).from_pretrained(stage).eval()
    return lambda inputs: model(**inputs)


def _is_added(program: Program, name: str) -> bool:
    return any(part in program.children for part in name.split("."))


def _program(program: Program, stage: Path, given: Mapping[str, Tensor], generation: bool) -> Run:
    """A torch.export program."""
    if not is_pretrained(program.base):
        return _plain_program(program.base, stage, given)
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    return _exported(program, stage, given, generation, DynamoExporter(), DynamoConfig(dynamic=True))


def _onnx(program: Program, stage: Path, given: Mapping[str, Tensor], generation: bool) -> Run:
    """An ONNX model."""
    if not is_pretrained(program.base):
        return _plain_onnx(program.base, stage, given)
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    return _exported(program, stage, given, generation, OnnxExporter(), OnnxConfig(dynamic=True))


def _exported(
    program: Program, stage: Path, given: Mapping[str, Tensor], generation: bool, exporter: Any, config: Any
) -> Run:
    """What one of transformers' exporters makes, in its own folder format, which it also runs."""
    base: Any = program.base
    with _quiet():
        try:
            made = exporter.export(base, dict(given), config)
            made.save_pretrained(stage)
            if generation:
                exporter.export_for_generation(base, dict(given), config).save_pretrained(stage / "generation")
        except Exception as error:  # Whatever tracing raises, of models that it can't take.
            raise ExportError(
                f"{original_class(base).__name__} can't be exported by {type(exporter).__name__}: {_first(error)}"
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
        raise ExportError(f"{original_class(model).__name__} can't be exported: {_first(error)}") from error
    torch.export.save(made, stage / PLAIN)
    return lambda inputs: torch.export.load(stage / PLAIN).module()(**inputs)


def _plain_onnx(model: nn.Module, stage: Path, given: Mapping[str, Tensor]) -> Run:
    batched = {name: {0: torch.export.Dim.AUTO} for name in given}
    path = stage / "model.onnx"
    with _quiet():
        try:
            torch.onnx.export(
                model, (), str(path), kwargs=dict(given), dynamic_shapes=batched, dynamo=True, verbose=False
            )
        except Exception as error:  # As above; and what has no ONNX operator.
            raise ExportError(f"{original_class(model).__name__} can't be exported: {_first(error)}") from error
    return lambda inputs: run_onnx(path, inputs)


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...] | Tensor:
    """The outputs of an ONNX model of one's own module; the only one, or a tuple."""
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made = session.run(None, {name: value.detach().cpu().numpy() for name, value in inputs.items()})
    outputs = tuple(torch.from_numpy(value) for value in made)
    return outputs[0] if len(outputs) == 1 else outputs


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextmanager
def _quiet() -> Generator[None]:
    """Without the warnings of exporters, and what they print of their progress."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_EXPORTERS: Mapping[str, Callable[..., Run]] = {"hf": _checkpoint, "pt2": _program, "onnx": _onnx}
