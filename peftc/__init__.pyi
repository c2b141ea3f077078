"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from peftc.api import compile, get_peft_model_state_dict, load, load_spec, plan, set_peft_model_state_dict
from peftc.checkpoint import LoadResult
from peftc.compiled import CompiledModel
from peftc.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConflictError,
    ExportError,
    MergeError,
    NoMatchError,
    PeftcError,
    PlanError,
    RuleError,
    SpecError,
)
from peftc.export import verify
from peftc.graph.ops import Form, Op, Shape, register_op, unregister_op
from peftc.integrations.trainer import install as _install
from peftc.plan import Plan
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import PromptSpec
from peftc.registry import register, spec_class_named, spec_classes, unregister
from peftc.rewrite.passes import Pass
from peftc.rule import Param, Rule
from peftc.specs import AdapterSpec
from peftc.stream import merge_checkpoint, unmerge_checkpoint

from peftc_rules.ia3.config import IA3Config
from peftc_rules.loha import LoHaConfig
from peftc_rules.lora.config import LoraConfig
from peftc_rules.p_tuning import PromptEncoderConfig
from peftc_rules.prefix_tuning import PrefixTuningConfig
from peftc_rules.prompt_tuning import PromptTuningConfig
from peftc_rules.trainable_tokens.config import TrainableTokensConfig

__all__ = [
    "AdapterError",
    "AdapterSpec",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "ConflictError",
    "ExportError",
    "Form",
    "IA3Config",
    "LoHaConfig",
    "LoadResult",
    "LoraConfig",
    "MergeError",
    "NoMatchError",
    "Op",
    "Param",
    "Pass",
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
    "Shape",
    "SpecError",
    "TrainableTokensConfig",
    "compile",
    "get_peft_model_state_dict",
    "load",
    "load_spec",
    "merge_checkpoint",
    "plan",
    "register",
    "register_op",
    "set_peft_model_state_dict",
    "unmerge_checkpoint",
    "unregister",
    "unregister_op",
    "verify",
]
