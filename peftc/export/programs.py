"""Exporting a model with its adapters: a transformers checkpoint, a torch.export program, an ONNX model.

transformers' own exporters and torch's do the work; here is what becomes of the adapters, that nothing is half written
and the live model is as it was, and the comparison of what came out with it.
"""

import inspect
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.checkpoint.atomic import staged
from peftc.choices import Adapters, Target
from peftc.errors import ExportError, MergeError
from peftc.export.adapter_files import write_adapter
from peftc.export.adapter_inputs import WRITERS as INPUT_WRITERS
from peftc.export.adapter_inputs import adapter_tensors, input_names, template, traced, with_adapters
from peftc.export.certificate import Certificate, agreement, certify, difference, sources, tensors_of
from peftc.export.exporters import EXPORTERS, Run, Written
from peftc.export.generation import TOKENS, Texts, live_tokens, require_generating, write_generation, written_tokens
from peftc.export.merged_gguf import write_merged
from peftc.export.probes import probe
from peftc.export.request import DEFAULT, Request, require_captured, require_possible
from peftc.export.tracing import first, guards_of, quiet
from peftc.graph.exported import without_autocast
from peftc.graph.sites import is_pretrained
from peftc.merge import merge, unmerge
from peftc.progress import Tick, bar
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program
from peftc.rewrite.switch import activate

_STEPS = ("what the live model computes", "writing", "comparing")
_LOG = logging.getLogger(__name__)
_HEADS = ("config.json", "export.json", "certificate.json")


def export(program: Program, folder: Path, to: Target, adapters: Adapters | None, **options: Any) -> Certificate:
    """Write the model to `folder` and compare what was written with it; see `CompiledModel.export`."""
    request = Request(to, adapters or DEFAULT.get(to, "merged"), **options)
    require_possible(program, request)
    begin = perf_counter()
    with bar(f"export to {to}", len(_STEPS), "steps", request.progress) as tick:
        certificate = _written(program, folder, request, tick)
        tick()
    _LOG.info("exported to %s in %.2f s: %s", folder, perf_counter() - begin, certificate)
    return certificate


def _written(program: Program, folder: Path, request: Request, tick: Tick) -> Certificate:
    if request.adapters == "beside":
        return _beside(program, folder, request.to, tick)
    if request.to == "gguf":
        return _gguf(program, folder, request, tick)
    given = _inputs(program.base, request.inputs)
    require_captured(program, given)
    if request.generation:
        require_generating(program.base, given)
    texts = Texts(request.tokenizer) if request.generation else None
    with _for_inference(program.base):
        if request.adapters == "inputs":
            return _as_inputs(program, folder, request, given, texts, tick)
        return _whole(program, folder, request, given, texts, tick)


def _whole(
    program: Program,
    folder: Path,
    request: Request,
    given: Mapping[str, Tensor],
    texts: Texts | None,
    tick: Tick,
) -> Certificate:
    """One program, or a checkpoint, with its adapters merged or inside."""
    to, adapters = request.to, request.adapters
    tick(0, _STEPS[0])
    expected = _expected(program.base, given, {})
    names = program.merged or program.spliced
    made_from = sources(program, names)
    tokens = _greedy(lambda ids: program.base(**ids), program.base, given)
    live = live_tokens(program.base, given) if texts is not None else []
    tick(1, _STEPS[1])
    with _merged(program, adapters), staged(folder, _HEADS) as stage:
        fixed = request.sizes == "fixed"
        written = EXPORTERS[to](program, stage, given, fixed)
        tick(1, _STEPS[2])
        largest, scale = difference(tensors_of(written.run(given)), expected)
        pairs = [(_written_greedy(to, written.run, program.base, given), tokens)] if not fixed else []
        said: dict[str, Any] = {"sources": made_from}
        if written.traced:
            said |= asdict(probe(to, written, lambda inputs: program.base(**inputs), given, fixed))
        if texts is not None:
            with quiet():
                said["generation"] = write_generation(program, stage, to, given, texts)
            pairs = [(written_tokens(stage, given, [None])[0], live)]
        return certify(stage, given, expected, to, adapters, names, largest, scale, **said, **agreement(pairs))


def _expected(base: nn.Module, given: Mapping[str, Tensor], more: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the live model computes. Raises ExportError if that is nothing to compare."""
    expected = tensors_of(base(**given, **more))
    if not expected:
        name = original_class(base).__name__
        raise ExportError(f"{name} gives no tensors for {sorted(given)}: nothing to compare")
    return expected


def _written_greedy(to: Target, run: Run, model: nn.Module, given: Mapping[str, Tensor]) -> list[int] | None:
    try:
        return _greedy(run, model, given)
    except Exception as error:  # Of any runtime.
        raise ExportError(
            f"to={to!r}: what was written does not run on other lengths than it was traced with: {first(error)}."
            " sizes='fixed' writes it for inputs of these sizes alone"
        ) from error


def _beside(program: Program, folder: Path, to: Target, tick: Tick) -> Certificate:
    """Every active adapter as a file of its own, for a base that the runtime has."""
    if not program.spliced:
        raise ExportError(f"to={to!r}: no adapter is active and unmerged, so there is nothing to write")
    tick(1, _STEPS[1])
    with staged(folder, _HEADS) as stage:
        found = [write_adapter(program, name, to, stage) for name in program.spliced]
        tick(1, _STEPS[2])
        largest, scale = (max(numbers) for numbers in zip(*found, strict=True))
        said = {"of": "weight changes", "sources": sources(program, program.spliced)}
        return certify(stage, {}, {}, to, "beside", program.spliced, largest, scale, **said)


def _gguf(program: Program, folder: Path, request: Request, tick: Tick) -> Certificate:
    """The base's own GGUF file with the merged weights in it."""
    assert request.gguf is not None, "it was asked for"
    names = program.merged or program.spliced
    made_from = sources(program, names)
    tick(1, _STEPS[1])
    with _merged(program, "merged"), staged(folder, _HEADS) as stage:
        numbers = write_merged(program, request.gguf, request.quantized, stage)
        tick(1, _STEPS[2])
        return certify(stage, {}, {}, "gguf", "merged", names, *numbers, of="merged weights", sources=made_from)


def _of_each(
    program: Program, given: Mapping[str, Tensor], more: Mapping[str, Any], generates: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[int]]]:
    """What the live model gives with each adapter alone: its outputs and, where it `generates`, its tokens."""
    outputs: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, list[int]] = {}
    for name in program.adapters:
        with _active(program, name):
            outputs[name] = _expected(program.base, given, more)
            if generates:
                tokens[name] = live_tokens(program.base, given)
    return outputs, tokens


def _as_inputs(
    program: Program, folder: Path, request: Request, given: Mapping[str, Tensor], texts: Texts | None, tick: Tick
) -> Certificate:
    """One program whose factors are inputs, and a file for every adapter."""
    to, fixed = request.to, request.sizes == "fixed"
    taken = inspect.signature(original_class(program.base).forward).parameters
    # A program takes no more than it was captured with.
    more = {"use_cache": False} if "use_cache" in taken and program.plan.capture != "export" else {}
    tick(0, _STEPS[0])
    expected, live = _of_each(program, given, more, texts is not None)
    names = tuple(expected)
    kept = None
    by_key, config = adapter_tensors(program)
    names_of = input_names({key for own in by_key.values() for key in own})
    tick(1, _STEPS[1])
    with staged(folder, _HEADS) as stage:
        with template(program, config, names_of) as made, quiet():
            whole = traced(program.base, made, given, more, to, fixed)
            tensors = {
                name: {names_of[key]: value.to(made.dtypes[names_of[key]]) for key, value in own.items()}
                for name, own in by_key.items()
            }
            INPUT_WRITERS[to](whole, made, list(expected[names[0]]), tensors, stage)
            if texts is not None:
                kept = write_generation(program, stage, to, given, texts, made, tensors)
        tick(1, _STEPS[2])
        run = with_adapters(stage)
        found = [difference(run(name, given), outputs) for name, outputs in expected.items()]
        largest, scale = (max(numbers) for numbers in zip(*found, strict=True))
        with _active(program, names[0]):
            written = Written(lambda inputs: run(names[0], inputs), guards_of(whole))
            probed = probe(to, written, lambda inputs: program.base(**inputs, **more), given, fixed)
        tokens = written_tokens(stage, given, list(live)) if live else []
        pairs = list(zip(tokens, live.values(), strict=True))
        said: dict[str, Any] = {"generation": kept, "sources": sources(program, names), **asdict(probed)}
        outputs = expected[names[0]]
        return certify(stage, given, outputs, to, "inputs", names, largest, scale, **said, **agreement(pairs))


@contextmanager
def _active(program: Program, name: str) -> Generator[None]:
    """A context in which one adapter is active."""
    active, learning, enabled = program.active, program.learning, program.enabled
    try:
        program.enabled = True
        activate(program, [name], [])
        yield
    finally:
        program.enabled = enabled
        activate(program, active, learning)


def _greedy(run: Run, model: nn.Module, given: Mapping[str, Tensor]) -> list[int] | None:
    """The next tokens of the first row, each from a call of its own; None of models that generate none from ids alone."""
    config: Any = getattr(model, "config", None)
    generates = is_pretrained(model) and cast(Any, model).can_generate()
    if not generates or config.is_encoder_decoder or not set(given) <= {"input_ids", "attention_mask"}:
        return None
    ids, tokens = given["input_ids"].expand(2, -1) if len(given["input_ids"]) == 1 else given["input_ids"], list[int]()
    for _ in range(TOKENS):
        inputs = {name: ids if name == "input_ids" else torch.ones_like(ids) for name in given}
        next_ids = tensors_of(run(inputs))["logits"][:, -1].argmax(-1, keepdim=True)
        tokens.append(int(next_ids[0]))
        ids = torch.cat([ids, next_ids.to(ids.device)], 1)
    return tokens


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
    """The model in eval(), without gradients and autocast, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), without_autocast(model):
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
