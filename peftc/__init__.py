"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from typing import Any

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
from peftc.export import preflight, verify
from peftc.graph.ops import Form, Op, Shape, register_op, unregister_op
from peftc.integrations.trainer import install as _install
from peftc.plan import Plan
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import PromptSpec
from peftc.registry import register, spec_class_named, spec_classes, unregister
from peftc.rewrite.passes import Pass
from peftc.rewrite.program_passes import program_passes
from peftc.rule import Param, Rule
from peftc.specs import AdapterSpec, Pattern
from peftc.stream import merge_checkpoint, unmerge_checkpoint

__all__ = [
    "AdapterError",
    "AdapterSpec",
    "CaptureError",
    "CheckpointError",
    "CompiledModel",
    "ConflictError",
    "ExportError",
    "Form",
    "LoadResult",
    "MergeError",
    "NoMatchError",
    "Op",
    "Param",
    "Pass",
    "Pattern",
    "PeftcError",
    "Plan",
    "PlanError",
    "PromptRule",
    "PromptSpec",
    "Rule",
    "RuleError",
    "Shape",
    "SpecError",
    "compile",
    "get_peft_model_state_dict",
    "load",
    "load_spec",
    "merge_checkpoint",
    "plan",
    "preflight",
    "program_passes",
    "register",
    "register_op",
    "set_peft_model_state_dict",
    "unmerge_checkpoint",
    "unregister",
    "unregister_op",
    "verify",
]

_install()


def __getattr__(name: str) -> Any:
    """The spec classes of registered methods: `peftc.LoraConfig` is the one that LoRA's rules bring."""
    found = spec_class_named(name) if name.endswith("Config") else None
    if found is None:
        raise AttributeError(f"module 'peftc' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return [*__all__, *(cls.__name__ for cls in spec_classes().values())]
