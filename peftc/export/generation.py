"""A step of generation as a program for a runtime, and `generate.py` beside it, which runs it.

With caches where the model has plain ones (keys and values that grow): one program serves the prompt and every token after
it. Else the program takes the whole sequence at every step.
"""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.errors import ExportError
from peftc.export import generate as standalone
from peftc.export.adapter_inputs import with_defaults, write_adapters, write_onnx_adapters
from peftc.export.certificate import tensors_of
from peftc.export.tracing import NOTHING, Template, first, onnx_of, program_of, write_compiled
from peftc.graph.sites import ModuleSite, WeightSite, is_pretrained, transformers_config
from peftc.rewrite.hosts import original_class
from peftc.rewrite.program import Program

FOLDER = "generation"
TOKENS = 8  # That are compared.
_ROWS, _NEW, _PAST = 2, 3, 5  # What is traced.
_PROMPT = "(the prompt)"


@dataclass(frozen=True)
class Step:
    """What a step of a model takes: `inputs` to trace it with, of names that `generate.py` knows; empty `caches`; what
    `more` every call has; the first token of what is generated, if that is not the prompt (`start`).
    """

    inputs: Mapping[str, Tensor]
    caches: Mapping[str, Tensor]
    more: Mapping[str, Any]
    start: int | None


@dataclass(frozen=True)
class Texts:
    """That a model is to be written for generation, and with which tokenizer of transformers, if any."""

    tokenizer: Any


def require_generating(model: Any, given: Mapping[str, Tensor]) -> None:
    """Raise ExportError if the model can't generate from ids alone."""
    cls = original_class(model).__name__
    if not is_pretrained(model) or not model.can_generate():
        raise ExportError(f"generation=True: {cls} does not generate; it is for transformers' generative models")
    known = {"input_ids", "attention_mask", "position_ids", "decoder_input_ids"}
    wrong = sorted(set(given) - known)
    if wrong or "input_ids" not in given:
        raise ExportError(
            f"generation=True: {cls} is called with {', '.join(wrong or given)}, and what generates here takes tokens"
            " alone. Export without it; transformers.exporters has export_for_generation for such models"
        )


def step_of(program: Program, given: Mapping[str, Tensor]) -> Step:
    """How the model is called for one step; `given` are the inputs that the model is exported with."""
    model: Any = program.base
    config: Any = model.config
    device = next(model.parameters()).device
    if program.plan.capture != "modules" or config.is_encoder_decoder or not _keeps_lengths(program):
        return _whole(program, given)
    taken = inspect.signature(original_class(model).forward).parameters
    layers = _layers(model, device)
    if not layers:
        return _whole(program, given)
    ids = torch.full((_ROWS, _NEW), 1, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(_ROWS, _PAST + _NEW, dtype=torch.int64, device=device)}
    inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW, device=device).repeat(_ROWS, 1)
    more = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in taken else {})}
    caches = {
        f"past_{number}_{part}": tensor[:1, :, :0].clone()
        for number, layer in enumerate(layers)
        for part, tensor in zip(("key", "value"), layer, strict=True)
    }
    return Step({name: value for name, value in inputs.items() if name in taken}, caches, more, None)


def _keeps_lengths(program: Program) -> bool:
    """Whether no adapter puts tokens of its own in front, which would have to be known for the caches."""
    sites = (program.plan.sites[edit.site] for name in program.active for edit in program.adapters[name].edits)
    return all(isinstance(site, WeightSite | ModuleSite) for site in sites)


def _layers(model: Any, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The keys and values (1, heads, 2, size) of every layer after two tokens; none if the model keeps anything else."""
    caches = import_module("transformers.cache_utils")
    try:
        kept = model(input_ids=torch.tensor([[1, 1]], device=device), use_cache=True).past_key_values
    except (AttributeError, TypeError):
        return []
    if type(kept) is not caches.DynamicCache:
        return []
    plain = (caches.DynamicLayer, caches.DynamicSlidingWindowLayer)
    if any(type(layer) not in plain or layer.keys is None or layer.keys.dim() != 4 for layer in kept.layers):
        return []
    return [(layer.keys, layer.values) for layer in kept.layers]


def _whole(program: Program, given: Mapping[str, Tensor]) -> Step:
    taken = inspect.signature(original_class(program.base).forward).parameters
    # A program that is captured takes no more than it was captured with.
    more = {"use_cache": False} if "use_cache" in taken and program.plan.capture == "modules" else {}
    return Step(dict(given), {}, more, _start(program.base))


def _start(model: Any) -> int | None:
    """What a decoder with an encoder starts with."""
    if not model.config.is_encoder_decoder:
        return None
    tokens = (model.generation_config.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None))
    found = [token for token in tokens if token is not None]
    if not found:
        raise ExportError("generation=True: the model's generation_config has no decoder_start_token_id; set it")
    return int(found[0])


def _stepping(model: nn.Module, made: Template, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One step: the logits (rows, vocabulary) of the next token in float32, and the caches after it."""
    own: dict[str, Any] = {name: tensors[name] for name in step.inputs}
    if step.caches:
        own["past_key_values"] = _cache([tensors[name] for name in step.caches])
    outputs = made.call(model, tensors, {**own, **step.more})
    found = {"logits": outputs["logits"][:, -1].float()}
    if step.caches:
        kept = [tensor for layer in outputs["past_key_values"].layers for tensor in (layer.keys, layer.values)]
        found |= {f"next_{name}": tensor for name, tensor in zip(step.caches, kept, strict=True)}
    return found


def _cache(tensors: Sequence[Tensor]) -> Any:
    made = import_module("transformers.cache_utils").DynamicCache()
    for number in range(len(tensors) // 2):
        made.update(tensors[2 * number], tensors[2 * number + 1], number)
    return made


def write_generation(
    program: Program,
    stage: Path,
    to: str,
    given: Mapping[str, Tensor],
    texts: Texts,
    made: Template = NOTHING,
    adapters: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> str:
    """Write the folder `generation`, and say whether it generates with caches.

    `adapters`: the factors by input of those that go beside it. Raises ExportError.
    """
    folder = stage / FOLDER
    folder.mkdir()
    said = _saved_tokenizer(texts.tokenizer, folder)
    step = step_of(program, given)
    if step.caches:
        try:
            traced = _traced(program.base, made, step, to)
        except ExportError:  # Caches that only a model's own Python can read.
            step = _whole(program, given)
            traced = _traced(program.base, made, step, to)
    else:
        traced = _traced(program.base, made, step, to)
    inputs = _write(traced, step, made, to, folder, adapters or {})
    said |= _said(program.base, step, made, to) | {"inputs": inputs, "adapters": list(adapters or {})}
    (folder / "generation.json").write_text(json.dumps(said, indent=1) + "\n")
    shutil.copyfile(standalone.__file__, folder / "generate.py")
    return "with caches" if step.caches else "whole sequences"


def _traced(base: nn.Module, made: Template, step: Step, to: str) -> Any:
    auto = torch.export.Dim.AUTO
    sizes: dict[str, dict[int, Any]] = {name: {0: auto, 1: auto} for name in step.inputs}
    examples = dict(step.inputs)
    for name, cache in step.caches.items():
        heads, size = cache.shape[1], cache.shape[3]
        examples[name] = torch.zeros(_ROWS, heads, _PAST, size, dtype=cache.dtype, device=cache.device)
        sizes[name] = {0: auto, 2: auto}
    return program_of(base, made, lambda tensors: _stepping(base, made, step, tensors), examples, sizes, to)


def _write(
    traced: Any, step: Step, made: Template, to: str, folder: Path, adapters: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    """Write the program and the adapters beside it; returns the inputs that are ids, masks and positions."""
    inputs = list(step.inputs)
    if to == "onnx":
        outputs = ["logits", *(f"next_{name}" for name in step.caches)]
        model = with_defaults(onnx_of(traced, outputs).model_proto, made)
        import_module("onnx").save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        taken = {entry.name for entry in model.graph.input}  # What nothing reads is left out.
        inputs = [name for name in inputs if name in taken]
    elif to == "aoti":
        write_compiled(traced, folder / "model.pt2")
    else:
        torch.export.save(traced, folder / "model.pt2")
    if adapters:
        (write_onnx_adapters if to == "onnx" else write_adapters)(adapters, folder)
    return inputs


def _said(model: Any, step: Step, made: Template, to: str) -> dict[str, Any]:
    """What `generate.py` has to know of the program."""
    own, config = model.generation_config, transformers_config(model)
    text: Any = config.get_text_config() if config is not None else None
    ends = own.eos_token_id if own.eos_token_id is not None else getattr(text, "eos_token_id", None)
    ends = [] if ends is None else ends
    ranks = {name: list(model.get_parameter(path).shape) for name, path in made.parameters.items()}
    return {
        "to": to,
        "file": "model.onnx" if to == "onnx" else "model.pt2",
        "caches": {name: [list(cache.shape), _name(cache.dtype)] for name, cache in step.caches.items()},
        "factors": {name: [sizes, _name(made.dtypes[name])] for name, sizes in ranks.items()} if to != "onnx" else {},
        "start": step.start,
        "stop": [int(token) for token in (ends if isinstance(ends, list | tuple) else [ends])],
        "shortest": 4 if step.caches else 2,  # What a trace takes for the least: two of each size.
        "longest": getattr(text, "max_position_embeddings", None),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _saved_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save a tokenizer of transformers; returns the text around a prompt in its form for chats. Raises ExportError."""
    if tokenizer is None:
        return {"chat": None}
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        raise ExportError(
            f"tokenizer: {type(tokenizer).__name__} saves no tokenizer.json, which generate.py reads; give the fast one"
        )
    chat = None
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": _PROMPT}]
        before, found, after = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        ).partition(_PROMPT)
        chat = [before, after] if found else None
    return {"chat": chat}


def written_tokens(stage: Path, given: Mapping[str, Tensor], adapters: Sequence[str | None]) -> list[list[int]]:
    """By adapter, the first tokens after the first row of `given` of what was written, each the likeliest.

    Raises ExportError.
    """
    ids = given["input_ids"][0].tolist()
    try:
        model = standalone.load(stage / FOLDER)
        return [list(standalone.generate(model, ids, tokens=TOKENS, stop=(), adapter=name)) for name in adapters]
    except Exception as error:  # Of any runtime.
        raise ExportError(f"generation=True: what was written does not generate: {first(error)}") from error


def live_tokens(model: Any, given: Mapping[str, Tensor]) -> list[int]:
    """The first tokens after the first row of `given` of the live model, each the likeliest."""
    ids = given["input_ids"][:1].expand(2, -1)  # A captured model takes two rows at least.
    start = _start(model)
    known = ids if start is None else torch.full_like(ids[:, :1], start)
    for _ in range(TOKENS):
        positions = torch.arange(known.shape[1], device=known.device).expand(2, -1)
        own = {"input_ids": ids, "decoder_input_ids": known, "position_ids": positions}
        own = {**own, "input_ids": known} if start is None else own
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        logits = tensors_of(model(**{name: own[name] for name in given}))["logits"][:, -1]
        known = torch.cat([known, logits.argmax(-1, keepdim=True)], 1)
    return known[0, -TOKENS:].tolist()
