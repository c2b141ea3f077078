"""PEFT's tables by method and by model type, as far as peftc has the methods, and what packages are there."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from peftc.architectures import families
from peftc.peft.configs import config_class
from peftc.peft.tuner import BaseTuner, tuner_class
from peftc.peft.types import PeftType
from peftc.registry import spec_classes

# Methods whose adapters are on modules, by the first name of their tensors.
_PREFIXES = {
    PeftType.LORA: "lora_",
    PeftType.IA3: "ia3_",
    PeftType.LOHA: "hada_",
    PeftType.TRAINABLE_TOKENS: "trainable_tokens_",
}


def _configs() -> dict[Any, type[Any]]:
    return {PeftType(name): config_class(cls) for name, cls in spec_classes().items()}


def _tuners() -> dict[Any, type[BaseTuner]]:
    return {name: tuner_class(cls()) for name, cls in _configs().items() if name in _PREFIXES}


def _targets(method: str, field: str) -> dict[str, Any]:
    found = {model: family.defaults.get(method, {}).get(field) for model, family in families().items()}
    return {model: list(value) if isinstance(value, tuple) else value for model, value in found.items() if value}


# By the name of the table, what makes it.
TABLES: dict[str, Callable[[], dict[Any, Any]]] = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": _configs,
    "PEFT_TYPE_TO_TUNER_MAPPING": _tuners,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _tuners,
    "PEFT_TYPE_TO_PREFIX_MAPPING": lambda: dict(_PREFIXES),
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": partial(_targets, "LORA", "target_modules"),
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": partial(_targets, "IA3", "target_modules"),
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": partial(_targets, "IA3", "feedforward_modules"),
}

# By PEFT's function that asks for it, the package.
_PACKAGES = {
    "is_bnb_available": "bitsandbytes",
    "is_bnb_4bit_available": "bitsandbytes",
    "is_gptqmodel_available": "gptqmodel",
    "is_optimum_available": "optimum",
    "is_aqlm_available": "aqlm",
    "is_eetq_available": "eetq",
    "is_hqq_available": "hqq",
    "is_torchao_available": "torchao",
    "is_diffusers_available": "diffusers",
    "is_inc_available": "neural_compressor",
    "is_te_available": "transformer_engine",
    "is_torch_tpu_available": "torch_xla",
    "is_transformers_available": "transformers",
}


def _is_there(package: str) -> bool:
    return find_spec(package) is not None


ASKING: dict[str, Callable[[], bool]] = {name: partial(_is_there, package) for name, package in _PACKAGES.items()}
