"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from peftc.api import compile, get_peft_model_state_dict, load, plan, set_peft_model_state_dict
from peftc.checkpoint import LoadResult
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
from peftc.stream import merge_checkpoint, unmerge_checkpoint

__all__ = [
    "AdapterError",
    "AdapterSpec",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "ConflictError",
    "IA3Config",
    "LoadResult",
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
    "get_peft_model_state_dict",
    "load",
    "load_spec",
    "merge_checkpoint",
    "plan",
    "register",
    "set_peft_model_state_dict",
    "unmerge_checkpoint",
    "unregister",
]
