"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from peftc.api import compile, load, plan
from peftc.compiled import CompiledModel
from peftc.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConflictError,
    MergeError,
    NoMatchError,
    PeftcError,
    PlanError,
    RuleError,
    SpecError,
)
from peftc.plan import Plan
from peftc.registry import register, unregister
from peftc.rule import Param, PromptRule, Rule
from peftc.specs import (
    AdapterSpec,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptSpec,
    PromptTuningConfig,
    load_spec,
)

__all__ = [
    "AdapterError",
    "AdapterSpec",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "ConflictError",
    "IA3Config",
    "LoraConfig",
    "MergeError",
    "NoMatchError",
    "Param",
    "PeftcError",
    "Plan",
    "PlanError",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptRule",
    "PromptSpec",
    "PromptTuningConfig",
    "Rule",
    "RuleError",
    "SpecError",
    "compile",
    "load",
    "load_spec",
    "plan",
    "register",
    "unregister",
]
