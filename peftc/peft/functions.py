"""PEFT's functions on models with adapters: injecting, state dicts, dtypes, quantised bases."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftc import api
from peftc.checkpoint import locate, read_adapter
from peftc.checkpoint.base import originals
from peftc.errors import AdapterError
from peftc.peft.adapted import BaseTunerLayer
from peftc.peft.configs import PeftConfig, spec_of
from peftc.peft.rooted import Rooted, in_base, root_in
from peftc.peft.roots import attach, take
from peftc.peft.tuner import cast_adapter_dtype
from peftc.registry import rules_of
from peftc.rewrite.sharding import put

__all__ = [
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "delete_adapter",
    "fsdp_auto_wrap_policy",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "set_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "shift_tokens_right",
    "transpose",
]

_PREFIX = "base_model.model."


class IncompatibleKeys(NamedTuple):
    """Keys of an adapter that a state dict lacked, and keys of the state dict that were not used."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give `model`, in place, the adapter that a config describes, active and in the dtypes of the weights.

    `state_dict`: of an adapter, whose keys say which modules are adapted, in the place of the config; its values are not
    read. The model's class stays, its `peft_config` has the configs by adapter. Raises SpecError, NoMatchError,
    ConflictError, AdapterError for virtual tokens; the model is as it was then.

    Example: model = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), model)
    """
    if isinstance(peft_config, PeftConfig) and peft_config.is_prompt_learning:
        raise AdapterError(f"{type(peft_config).__name__}: virtual tokens can't be injected; use get_peft_model")
    config = peft_config if state_dict is None else _as_in(state_dict, peft_config, model)
    root = attach(model, {adapter_name: config}, autocast=False)
    if config is not peft_config:
        take(root, adapter_name, peft_config)
    root.activate(adapter_name, inference_mode=bool(getattr(peft_config, "inference_mode", False)))
    root.program.base.__dict__["peft_config"] = root.configs
    return model


def _as_in(state_dict: Mapping[str, Tensor], config: Any, model: nn.Module) -> Any:
    """The spec of `config` for the modules of `model` that keys of `state_dict` have tensors of.

    Raises AdapterError if they have none of its method.
    """
    spec = spec_of(config)
    firsts = {first for rule in rules_of(spec) for first in rule.keys}
    paths = [key.removeprefix(spec.key_prefix).split(".") for key in state_dict]
    ends = [next((end for end, part in enumerate(path) if part in firsts), 0) for path in paths]
    found = dict.fromkeys(".".join(path[:end]) for path, end in zip(paths, ends, strict=True) if end)
    known = dict(model.named_modules())
    missing = [name for name in found if name not in known]
    if len(missing) == len(found):
        told = f"{missing[0]!r} is no module" if missing else f"no key is of {spec.peft_type}"
        raise AdapterError(f"state_dict: {told}; leave it out, and the config says what is adapted")
    if missing:
        warnings.warn(f"state_dict: {', '.join(missing[:3])}: no such modules; without them", stacklevel=3)
    return spec.respelled({name: name for name in found if name in known})


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[Any] = BaseTunerLayer
) -> list[str]:
    """Take an adapter off; the names of those that are active then. Raises AdapterError on an unknown name."""
    root = root_in(model)
    root.delete(adapter_name)
    return list(root.program.active)


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[Any] = BaseTunerLayer,
) -> None:
    """Activate exactly these adapters, and train them unless `inference_mode`."""
    root_in(model).activate(adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let these adapters train, active or not, or freeze them."""
    root_in(model).compiled.set_requires_grad(adapter_names, requires_grad)


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Any = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by the keys of its file; of a model with injected adapters without `base_model.model.`.

    `state_dict`: the whole model's, to take them from (gathered from shards). Raises AdapterError on an unknown name.
    """
    root = root_in(model)
    full = None if state_dict is None else in_base(model, state_dict)
    state = api.get_peft_model_state_dict(
        root.compiled, full, adapter_name, save_embedding_layers=save_embedding_layers
    )
    return state if _wrapped(model) else {key.removeprefix(_PREFIX): value for key, value in state.items()}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Copy tensors into an adapter, by the keys of files or of `get_peft_model_state_dict`. Missing and unexpected keys
    are reported.

    Raises CheckpointError, with nothing copied, on mis-shaped keys, NaN, Inf; AdapterError on an unknown name.
    """
    root = root_in(model)
    prefix = "" if _wrapped(model) else _PREFIX
    given = {
        key if key.startswith("base_model.") else prefix + key: value for key, value in peft_model_state_dict.items()
    }
    result = api.set_peft_model_state_dict(root.compiled, given, adapter_name, ignore_mismatched_sizes)
    return IncompatibleKeys(list(result.missing_keys), list(result.unexpected_keys))


def _wrapped(model: Any) -> bool:
    return isinstance(getattr(model, "_orig_mod", model), Rooted)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The checked tensors of an adapter's folder or Hub repository, by their keys.

    `key_mapping`: as in `CompiledModel.load_adapter`. Raises CheckpointError.
    """
    folder = locate(model_id, hf_hub_download_kwargs.pop("subfolder", None), **hf_hub_download_kwargs)
    tensors = read_adapter(folder, allow_pickle=True, key_mapping=key_mapping).tensors
    return {key: value if device is None else value.to(device) for key, value in tensors.items()}


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The tensors of the base by its own names, whatever is merged or saved whole. Raises AdapterError without adapters."""
    program = root_in(model).program
    parameters = {name for name, _ in program.base.named_parameters(remove_duplicate=False)}
    state = {
        name: value
        for name, value in program.base.state_dict().items()
        if name in program.given.requires_grad or (name not in parameters and ".modules_to_save." not in name)
    }
    return {**state, **originals(program, [name for name in state if name in program.given.requires_grad])}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> IncompatibleKeys:
    """Copy tensors into the base, by its names. Raises AdapterError, with nothing copied, if names differ and `strict`."""
    own = get_base_model_state_dict(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if strict and (missing or unexpected):
        raise AdapterError(
            f"the state dict lacks {missing[:3]} and has {unexpected[:3]} beside; strict=False takes what fits"
        )
    with torch.no_grad():
        for name, value in state_dict.items():
            if name in own:
                put(own[name], value)
    return IncompatibleKeys(missing, unexpected)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype`, and what trains to float32. Raises TypeError on what is no dtype."""
    if not isinstance(cast(Any, dtype), torch.dtype):
        raise TypeError(f"cast_mixed_precision_params: got {dtype!r}; give a dtype, as torch.bfloat16")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a (quantised) base, cast its half-precision parameters to float32, and checkpoint its activations if it is
    quantised; gradients reach the adapters whatever the kind of checkpointing is.
    """
    quantised = any(
        getattr(model, name, False)
        for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "hf_quantizer")
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if type(parameter) is nn.Parameter and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    if quantised and use_gradient_checkpointing:
        kwargs = (
            {}
            if gradient_checkpointing_kwargs is None
            else {"gradient_checkpointing_kwargs": gradient_checkpointing_kwargs}
        )
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(**kwargs)
    return model


# As it was called before it was for four bits too.
prepare_model_for_int8_training = prepare_model_for_kbit_training


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """What a decoder is given for the labels `input_ids` (batch, length): one to the right, −100 padded."""
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, turned if it is stored (in, out)."""
    return weight.T if fan_in_fan_out else weight


def infer_device() -> str:
    """The kind of accelerator that is there, or `cpu`."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def fsdp_auto_wrap_policy(model: Any) -> Callable[..., bool]:
    """The policy of FSDP1 that wraps trained leaves and the layers that transformers does not split, or those of
    `FSDP_TRANSFORMER_CLS_TO_WRAP`.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = set(given.split(",")) if given else set(cast(Any, getattr(model, "_no_split_modules", None) or ()))
    layers = {type(module) for module in model.modules() if type(module).__name__ in names}

    def trained_leaf(module: nn.Module) -> bool:
        own = list(module.parameters(recurse=False))
        return not list(module.children()) and bool(own) and all(parameter.requires_grad for parameter in own)

    policies = [
        partial(lambda_auto_wrap_policy, lambda_fn=trained_leaf),
        partial(transformer_auto_wrap_policy, transformer_layer_cls=layers),
    ]
    return partial(_or_policy, policies=policies)


def submodules_at(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of a module, the module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name
