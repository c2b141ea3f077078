"""`compile`, `plan` and `load`: where everything begins."""

from typing import Any

from torch import nn

from peftc.compiled import CompiledModel, OnUnmatched
from peftc.graph.region import Capture
from peftc.lifecycle import planned
from peftc.plan import Plan, require_same
from peftc.registry import spec_classes
from peftc.rewrite.build import build, require_applicable
from peftc.specs import load_specs


def compile(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    inplace: bool = False,
    on_unmatched: OnUnmatched = "error",
    autocast_adapter_dtype: bool = True,
) -> CompiledModel:
    """Compile `model` with the adapters of `spec`. The model is not changed, unless `inplace`.

    `spec`: a spec, a dict, a path to `adapter_config.json` or YAML, an object with PEFT's `to_dict()`, a mapping of
    adapter names to any of these (the first becomes active), or a Plan, which is applied exactly as it is.
    `capture`: `modules` (any model), or `symbolic` (one flat graph, for models that torch.fx traces).
    `inplace`: rewrite the model itself instead of a structural copy; `unload()` then gives it back intact.
    `on_unmatched`: `warn` goes on without selectors that match nothing. `autocast_adapter_dtype`: adapters of float16
    and bfloat16 weights are float32.

    Raises SpecError, NoMatchError, ConflictError, CaptureError, AdapterError (a bad name, or a model compiled already),
    PlanError (the model is not the planned one). Nothing is changed then.
    """
    if isinstance(spec, Plan):
        made, regions = planned(model, spec.adapters, spec.capture, spec.autocast_adapter_dtype)
        require_same(spec, made)
        made = spec
    else:
        specs = load_specs(spec, adapter_name, spec_classes())
        made, regions = planned(model, specs, capture, autocast_adapter_dtype)
    require_applicable(made, on_unmatched)
    return CompiledModel(build(model, made, regions, inplace, fresh=True))


def plan(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    autocast_adapter_dtype: bool = True,
) -> Plan:
    """What `compile` would change, without changing anything or reading a weight. Arguments as there.

    Misses and conflicts are in the plan, where `compile` raises. Raises SpecError, NoMatchError (no default targets for
    the model type), CaptureError.
    """
    return planned(model, load_specs(spec, adapter_name, spec_classes()), capture, autocast_adapter_dtype)[0]


# peftc.load(model, "a folder or a Hub repository")
load = CompiledModel.from_pretrained
