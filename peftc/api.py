"""`compile`, `plan` and `load`, where everything begins; an adapter's tensors as PEFT's functions give and take them."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftc.checkpoint import LoadResult, SaveEmbeddings, load_state, saved_state_dict
from peftc.compiled import CompiledModel, OnUnmatched
from peftc.errors import AdapterError, CheckpointError
from peftc.graph.copying import structural_copy
from peftc.graph.region import Capture
from peftc.lifecycle import Batches, calibrated, looked_through, planned, require_known, require_unmerged, reshaped
from peftc.plan import Plan, require_applicable, require_same
from peftc.plan.heads import unsaved
from peftc.registry import spec_classes
from peftc.rewrite.build import build, no_collection
from peftc.rewrite.calibration import Calibration, Call, Rows, observe
from peftc.rewrite.passes import Pass, passes_of
from peftc.specs import AdapterSpec, load_specs
from peftc.specs import load_spec as _load_spec


def compile(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    inputs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    on_unmatched: OnUnmatched = "error",
    autocast_adapter_dtype: bool = True,
    passes: Sequence[Pass] = (),
    calibration: Batches = None,
) -> CompiledModel:
    """Compile `model` with the adapters of `spec`. The model is not changed, unless `inplace`.

    `spec`: a spec, a dict, a path to `adapter_config.json` or YAML, an object with PEFT's `to_dict()`, a mapping of
    adapter names to any of these (the first becomes active), or a Plan, which is applied exactly as it is.
    `capture`: `modules` (any model), `symbolic` (one flat graph, for models that torch.fx traces), or `export` (one flat
    graph of aten ops, by torch.export, which takes exactly what `inputs` names: examples of two rows and more).
    `inplace`: rewrite the model itself instead of a structural copy; `unload()` then gives it back intact.
    `on_unmatched`: `warn` goes on without selectors that match nothing. `autocast_adapter_dtype`: adapters of float16
    and bfloat16 weights are float32. `passes`: run in this order over every rewritten graph (see `peftc.Pass`).
    `calibration`: for adapters that start from data, batches that the model is called with, or what `calibrate` returns.

    Example: model = peftc.compile(model, peftc.LoraConfig(r=16, target_modules="all-linear"))

    Raises SpecError, NoMatchError, ConflictError, CaptureError, AdapterError (a bad name, or a model compiled already),
    PlanError (the model is not the planned one), RuleError (a pass that is none). Nothing is changed then.
    """
    model, wanted = looked_through(model), passes_of(passes)
    specs = spec.adapters if isinstance(spec, Plan) else load_specs(spec, adapter_name, spec_classes())
    level, autocast = capture, autocast_adapter_dtype
    if isinstance(spec, Plan):
        level, autocast = spec.capture, spec.autocast_adapter_dtype
    with no_collection(), reshaped(model, specs, inplace) as base:
        plan_of = partial(planned, base, capture=level, autocast=autocast, inputs=inputs)
        made, regions, starts = calibrated(plan_of, base, specs, calibration, on_unmatched, on_copy=not inplace)
        if isinstance(spec, Plan):
            require_same(spec, made)
            made = spec
        require_applicable(made, on_unmatched)
        lost = unsaved(base, made)
        if lost is not None:
            warnings.warn(lost, stacklevel=2)
        return CompiledModel(build(base, made, regions, inplace, fresh=True, passes=wanted, starts=starts))


def calibrate(
    model: nn.Module,
    spec: Any,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    rows: Rows | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """What an adapter of `spec` starts from, if it starts from data: run `model` over `batches`, and change nothing.

    `batches`: what the model is called with, a mapping of keyword arguments, a tuple of positional ones or the one
    argument; they are taken from one iterator, and gone through again while the method asks for more. `call(model, batch)`
    runs the model otherwise, and where gradients are asked for it returns the loss (by default the output's). `rows(x,
    batch, fqn)` takes what to look at, (n, features), from the input `x` of a module.
    `resume`: a file in which is kept now and then, and in the end, what the batches so far have shown. A later call with
    the same model, spec and batches goes on from there: it runs the model only on the batches that come after.
    `progress=False`: no bar on a terminal.

    Example: model = peftc.compile(model, spec, calibration=peftc.calibrate(model, spec, batches))

    Raises AdapterError: no rule starts from data with this spec, `batches` is nothing to go through, the model can't be
    called with one, none reaches one of its sites, they do not settle, or the file is of something else; SpecError,
    NoMatchError as `compile`.
    """
    model, kept = looked_through(model), None if resume is None else Path(resume)
    own = load_spec(spec)
    with reshaped(model, {"default": own}) as base:
        made = planned(base, {"default": own}, "modules", True)[0]
        require_applicable(made, "error")
        return observe(structural_copy(base), made, "default", own, batches, call, rows, resume=kept, progress=progress)


def plan(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    inputs: Mapping[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
) -> Plan:
    """What `compile` would change, without changing anything or reading a weight. Arguments as there.

    Example: print(peftc.plan(model, peftc.LoraConfig(target_modules="all-linear")))

    Misses and conflicts are in the plan, where `compile` raises. Raises SpecError, NoMatchError (no default targets for
    the model type), CaptureError.
    """
    model = looked_through(model)
    specs = load_specs(spec, adapter_name, spec_classes())
    with reshaped(model, specs) as base:
        made = planned(base, specs, capture, autocast_adapter_dtype, inputs=inputs)[0]
        lost = unsaved(base, made)
    return made if lost is None else replace(made, cautions=(*made.cautions, lost))


def load_spec(source: Any, known: Mapping[str, type[AdapterSpec]] | None = None) -> AdapterSpec:
    """A spec from a spec, a dict, a path (a JSON or YAML file, or a folder with `adapter_config.json`), or an object with
    PEFT's `to_dict()`. `known`: spec class by `peft_type`, by default those of all registered methods.

    Example: spec = peftc.load_spec("adapter/adapter_config.json")

    Raises SpecError: unknown or missing `peft_type`, broken file, wrong fields. Keys peftc does not know are kept and
    reported with one warning.
    """
    return _load_spec(source, spec_classes() if known is None else known)


def get_peft_model_state_dict(
    model: CompiledModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter as its file holds them, by PEFT's keys, without the adapter's name.

    Example: torch.save(peftc.get_peft_model_state_dict(model), "adapter.pt")

    `state_dict`: the whole model's, to take them from (gathered from shards). `unwrap_compiled`: `model` is what
    torch.compile returned. Raises AdapterError on an unknown name, CheckpointError if `state_dict` lacks one.
    """
    own = _compiled(getattr(model, "_orig_mod", model) if unwrap_compiled else model)
    require_known(own.program.plan, [adapter_name])
    return saved_state_dict(own.program, adapter_name, save_embedding_layers, state_dict)


def set_peft_model_state_dict(
    model: CompiledModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Copy tensors by PEFT's keys into an adapter that the model has.

    Example: peftc.set_peft_model_state_dict(model, torch.load("adapter.pt"))

    As in PEFT, missing and unexpected keys are left out and reported (with a warning, and in the result); mis-shaped ones
    only with `ignore_mismatched_sizes`. Raises CheckpointError, with nothing copied, on mis-shaped keys, integers, NaN and
    Inf; AdapterError on an unknown name; MergeError while merged.
    """
    model = _compiled(model)
    require_known(model.program.plan, [adapter_name])
    require_unmerged(model.program, "set_peft_model_state_dict")
    given: Any = peft_model_state_dict
    pairs: Any = given.items() if isinstance(given, Mapping) else [(None, given)]
    wrong = [(key, value) for key, value in pairs if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong:
        raise CheckpointError(
            f"the state dict: expected tensors by name, got a {type(wrong[0][1]).__name__} ({wrong[0][0]!r})"
        )
    return load_state(model.program, adapter_name, peft_model_state_dict, strict=False, resized=ignore_mismatched_sizes)


def _compiled(model: Any) -> CompiledModel:
    if not isinstance(model, CompiledModel):
        raise AdapterError(
            f"expected a compiled model, got a {type(model).__name__}; peftc.compile and peftc.load make one"
        )
    return model


# peftc.load(model, "a folder or a Hub repository")
load = CompiledModel.from_pretrained
