"""Prompt methods in the plan: which calls they enter, and what is added there."""

from typing import Any

import torch
from torch import nn

from peftc.errors import RuleError
from peftc.graph.calls import CallSite, find_calls
from peftc.graph.sites import SiteIndex
from peftc.plan.match import Match, match_saved
from peftc.plan.plan import Edit, Miss, PlannedParam
from peftc.rule import Constant, PromptRule
from peftc.specs import PromptSpec

# The child of a call's module that holds the encoders, by adapter name, as in PEFT.
PROMPT_ENCODER = "prompt_encoder"


def match_call(
    adapter: str, spec: PromptSpec, rule: PromptRule[Any], model: nn.Module, level: str, index: SiteIndex
) -> Match:
    """Resolve `spec` against the calls of `model`; a reason why there is none is a miss."""
    saved, misses = match_saved(adapter, spec, index)
    if spec.task_type is None:
        reason = (
            "says what becomes of labels, positions and heads, so it is required: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, …"
        )
        return Match(spec, (), saved, (*misses, Miss(adapter, "task_type", "None", reason)))
    if level != "modules":
        reason = f"needs capture='modules': under {level!r} the model's call is already part of the graph"
        return Match(spec, (), saved, (*misses, Miss(adapter, "peft_type", spec.peft_type, reason)))
    calls = find_calls(model, rule.at, spec.task_type, index)
    if isinstance(calls, str):
        return Match(spec, (), saved, (*misses, Miss(adapter, "peft_type", spec.peft_type, calls)))
    stack = calls[0].site.stack
    assert stack is not None, "a call has one"
    spec = rule.resolve(spec, stack)
    reason = rule.disagreement(spec, stack)
    if reason is not None:
        return Match(spec, (), saved, (*misses, Miss(adapter, "peft_type", spec.peft_type, reason)))
    return Match(spec, (), saved, tuple(misses), tuple(calls))


def call_edit(adapter: str, spec: PromptSpec, rule: PromptRule[Any], call: CallSite, dtype: str) -> Edit:
    """The edit that `rule` makes at `call`. Raises RuleError if its encoder does not return what the contract says."""
    constants: dict[str, Constant] = {
        "num_virtual_tokens": spec.num_virtual_tokens,
        "task_type": str(spec.task_type),
        "embedding": call.site.stack.embedding if call.site.stack is not None else "",
        "drop": call.drop,
    }
    params: tuple[PlannedParam, ...] = ()
    if call.slot == "past":
        constants |= {
            field: spec.fact(field) for field in ("num_layers", "num_attention_heads", "num_transformer_submodules")
        }
    if call.slot != "memory":
        constants["rows"] = spec.rows
        params = _encoder_params(spec, rule, dtype)
    return Edit(
        site=call.site.fqn,
        adapter=adapter,
        rule=rule.name,
        slot=call.slot,
        params=params,
        constants=constants,
        dropouts={},
        unmergeable=rule.cannot_fold(spec, call.site),
    )


def _encoder_params(spec: PromptSpec, rule: PromptRule[Any], dtype: str) -> tuple[PlannedParam, ...]:
    where = f"rule {rule.name!r} ({type(rule).__name__}.encoder)"
    with torch.device("meta"):
        encoder = rule.encoder(spec)
        if not isinstance(encoder, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RuleError(f"{where} returns {type(encoder).__name__}, no nn.Module")
        shape = tuple(encoder(torch.zeros(1, spec.rows, dtype=torch.long)).shape)
    expected = (1, spec.rows, rule.width(spec))
    if shape != expected:
        raise RuleError(f"{where}: the encoder returns shape {shape}, not (1, rows, width) = {expected}")
    return tuple(
        PlannedParam(name, f"{PROMPT_ENCODER}.{name}", tuple(parameter.shape), dtype, "encoder")
        for name, parameter in encoder.named_parameters()
    )
