"""Specs: what to adapt, as validated data with the field names of PEFT's `adapter_config.json`."""

from peftc.specs.base import AdapterSpec
from peftc.specs.ia3 import IA3Config
from peftc.specs.io import BUILTIN_SPECS, load_spec, load_specs
from peftc.specs.lora import LoraConfig
from peftc.specs.prompts import PrefixTuningConfig, PromptEncoderConfig, PromptSpec, PromptTuningConfig

__all__ = [
    "BUILTIN_SPECS",
    "AdapterSpec",
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptSpec",
    "PromptTuningConfig",
    "load_spec",
    "load_specs",
]
