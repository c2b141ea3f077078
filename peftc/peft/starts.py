"""PEFT's functions that let LoRA start from data: they run the model as scripts say, and attach what comes of it."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.sites import WeightSite, canonical
from peftc.lifecycle import planned
from peftc.peft.configs import spec_of
from peftc.peft.rooted import root_in
from peftc.peft.roots import CALIBRATED, Root, attach, root_of
from peftc.plan import Plan, require_applicable
from peftc.rewrite.build import parked
from peftc.rewrite.calibration import Calibration, Call, observe
from peftc.specs import AdapterSpec
from peftc.specs.selection import exact_patterns

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "preprocess_corda",
    "preprocess_loraga",
]

_PREFIX = "base_model.model."


def forward_fn_dict(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Call the model with a batch."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: Any) -> Tensor:
    """The indices (n, 2) of the positions that are neither padding nor, as the config has it, without a label."""
    told = peft_config.eva_config
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if told.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != told.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input at those positions."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x[tuple(model_input.T.to(x.device))]


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The directions (rank, features) that A starts with, by module. `model`: a PeftModel, or a base with `peft_config`.

    The arguments are PEFT's; every process looks at its own batches, and nothing is shown of the progress. Raises
    AdapterError.
    """
    root = root_of(model) if peft_config is not None else root_in(model)
    config = peft_config if root is None else root.configs[adapter_name]
    spec, prefix = spec_of(config), "" if root is None else _PREFIX
    rows = functools.partial(_rows, config, prepare_model_inputs_fn, prepare_layer_inputs_fn, prefix)

    def call(base: nn.Module, batch: Any) -> Any:
        device = next((p.device for p in base.parameters() if not p.is_meta), None)
        return forward_fn(base, _moved(batch, device))

    if root is None:
        plan, found = _observed(model, spec, dataloader, call, rows)
    else:
        with parked(root.program) as base:
            plan, found = _observed(base, spec, dataloader, call, rows)
    none = {
        edit.site: torch.zeros(0, cast(WeightSite, plan.sites[edit.site]).in_features)
        for edit in plan.edits
        if plan.sites[edit.site].op == "linear"
    }
    return {prefix + site: value for site, value in {**none, **found.data}.items()}


def _observed(
    base: nn.Module, spec: AdapterSpec, batches: Iterable[Any], call: Any, rows: Any = None, share: bool = True
) -> tuple[Plan, Calibration]:
    plan = planned(base, {"default": spec}, "modules", True)[0]
    require_applicable(plan, "warn")
    return plan, observe(base, plan, "default", spec, batches, call, rows, share)


def _rows(config: Any, model_fn: Any, layer_fn: Any, prefix: str, x: Tensor, batch: Any, fqn: str) -> Tensor:
    """What to look at of a module's input, as PEFT's two functions say."""
    given = batch if model_fn is None else model_fn(batch, config)
    own = layer_fn.get(prefix + fqn) if isinstance(layer_fn, Mapping) else layer_fn
    return x.reshape(-1, x.shape[-1]) if own is None else own(x, given, prefix + fqn)


def _moved(inputs: Any, device: Any) -> Any:
    """What a model is called with, on its device."""
    if isinstance(inputs, Tensor) or callable(getattr(inputs, "to", None)):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device) for key, value in cast("Mapping[str, Any]", inputs).items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_moved(value, device) for value in cast("list[Any]", inputs))
    return inputs


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter with `init_lora_weights="eva"` start from data, or from what `get_eva_state_dict` has found.

    Its tensors are new ones, of the ranks that follow, and its config says so. Raises AdapterError, ValueError.
    """
    root = root_in(model)
    config = root.configs.get(adapter_name)
    if getattr(config, "init_lora_weights", None) != "eva":
        raise AdapterError("initialize_lora_eva_weights: the adapter's config has no init_lora_weights='eva'")
    if len(root.program.active) > 1:
        raise AdapterError("initialize_lora_eva_weights: several adapters are active; set_adapter to one")
    if eva_state_dict is None:
        if dataloader is None:
            raise AdapterError("initialize_lora_eva_weights: give a dataloader, or an eva_state_dict")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
        )
    found = _decided(spec_of(config), {name.removeprefix(_PREFIX): value for name, value in eva_state_dict.items()})
    _replace(root, adapter_name, config, found)


def _decided(spec: Any, directions: Mapping[str, Tensor]) -> Calibration:
    """The start that these directions are, with ranks and alphas by module."""
    kept = {fqn: value for fqn, value in directions.items() if len(value)}
    ranks = {fqn: len(value) for fqn, value in kept.items()}
    adjust = spec.eva_config is None or spec.eva_config.adjust_scaling_factors
    alphas = {fqn: spec.alpha_for(fqn) * (rank / spec.rank_for(fqn) if adjust else 1) for fqn, rank in ranks.items()}
    update: dict[str, Any] = {
        "rank_pattern": {**exact_patterns(ranks, None if spec.rank_pattern else spec.r), **spec.rank_pattern},
        "alpha_pattern": {
            **exact_patterns(alphas, None if spec.alpha_pattern else spec.lora_alpha),
            **spec.alpha_pattern,
        },
    }
    if len(kept) < len(directions):
        update |= {"target_modules": tuple(kept), "exclude_modules": None}
        update |= {"layers_to_transform": None, "layers_pattern": None}
    return Calibration(spec, spec.model_copy(update=update), kept)


def _replace(root: Root, name: str, config: Any, found: Calibration) -> None:
    """Attach the adapter anew, from data, in the place of the one that has none."""
    active, learning = root.program.active, root.program.learning
    for field in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        value = getattr(found.spec, field)
        setattr(config, field, set(value) if isinstance(value, tuple) else value)
    root.delete(name)
    attach(root.program.base, {name: config}, autocast=root.program.plan.autocast_adapter_dtype, calibration=found)
    root.compiled.set_adapter(list(active))
    root.compiled.set_requires_grad(name, name in learning)


def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """See the inputs of the config's modules while `run_model` runs the model; get_peft_model starts from them.

    The covariances, (in, in) by module, are kept in `covariance_file` or `cache_file` of `corda_config`, and read from
    there if it is there. Raises AdapterError.
    """
    spec: Any = spec_of(lora_config)
    told = spec.corda_config
    if told is None:
        raise AdapterError("preprocess_corda: the config needs corda_config=CordaConfig(...)")
    files = [Path(name) for name in (told.covariance_file, told.cache_file) if name is not None]
    known = next((file for file in files if file.is_file()), None)
    if known is not None:
        data = {name: (value, told.corda_method) for name, value in _read(known).items()}
        found = Calibration(spec, spec, data)
    elif run_model is None:
        raise AdapterError(
            "preprocess_corda: give run_model, which runs the model on data; no file has covariances yet"
        )
    else:
        base = model if hooked_model is None else hooked_model
        found = _observed(base, spec, [None], _calling(run_model), share=False)[1]
    for file in files if known is None else ():
        _write(file, {name: value[0] for name, value in found.data.items()})
    _keep(model, found)


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """See the gradients by the weights of the config's modules while `train_step` goes forward and backward;
    get_peft_model starts from them. They are kept in `cache_file`, and read from there if it is there.

    Raises AdapterError. Unlike PEFT, the model is in eval() meanwhile.
    """
    spec: Any = spec_of(lora_config)
    if spec.lora_ga_config is None:
        raise AdapterError("preprocess_loraga: the config needs lora_ga_config=LoraGAConfig(...)")
    plan = planned(model, {"default": spec}, "modules", True)[0]
    suffix, file = "._peft_loraga_grad", None if cache_file is None else Path(cache_file)

    def turned(name: str, gradient: Tensor) -> Tensor:
        return canonical(gradient, cast(WeightSite, plan.sites[name]))  # As the weight is stored, or back.

    if file is not None and file.is_file():
        states = {name.removesuffix(suffix): value for name, value in _read(file).items()}
        rule = next(edit.rule for edit in plan.edits)
        new, data = rule.calibrated(spec, {name: turned(name, value).float() for name, value in states.items()})
        found = Calibration(spec, new, data)
    else:
        found = _observed(model, spec, [None], _calling(train_step))[1]
        if file is not None:
            _write(file, {name + suffix: turned(name, value[0]) for name, value in found.data.items()})
    _keep(model, found)


def _calling(function: Callable[[], Any]) -> Call:
    """What runs a model by a script's own function, which goes backward itself if it has to."""

    def call(base: nn.Module, batch: Any) -> None:
        function()

    return call


def _keep(model: nn.Module, found: Calibration) -> None:
    model.__dict__.setdefault(CALIBRATED, []).append(found)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors by module that a file holds. Raises AdapterError if it holds something else."""
    found: Any = torch.load(file, map_location="cpu", weights_only=True)
    if any(".eigens." in str(name) for name in found):
        raise AdapterError(f"{file}: is PEFT's cache of another decomposition; delete it, and it is made again")
    return found


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    os.makedirs(file.parent, exist_ok=True)
    torch.save(dict(tensors), file)
