"""Prompt methods in the plan: which calls they enter, and what is added there."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from peftc.errors import RuleError
from peftc.graph.calls import CallSite, find_calls
from peftc.graph.sites import SiteIndex
from peftc.plan.match import Match, match_saved
from peftc.plan.plan import Edit, Miss, PlannedParam
from peftc.registry import find_prompt_rule
from peftc.rule import Constant, PromptRule
from peftc.specs import PromptSpec

# The child of a call's module that holds the encoders, by adapter name, as in PEFT.
PROMPT_ENCODER = "prompt_encoder"


def match_call(
    adapter: str, spec: PromptSpec, rule: PromptRule[Any], model: nn.Module, level: str, index: SiteIndex
) -> Match:
    """Resolve `spec` against the calls of `model`; a reason why there is none is a miss."""
    saved, misses = match_saved(adapter, spec, index)

    def missed(reason: str, field: str = "peft_type") -> Match:
        miss = Miss(adapter, field, str(getattr(spec, field)), reason)
        return Match(spec, (), saved, (*misses, miss))

    if spec.task_type is None:
        tasks = "CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION"
        return missed(f"leaves open what becomes of labels, positions and heads; give {tasks}", "task_type")
    if level != "modules":
        return missed("needs capture='modules', which keeps the model's own call")
    calls = find_calls(model, rule.at, spec.task_type, index)
    if isinstance(calls, str):
        return missed(f"can't be used here: {calls}")
    stack = calls[0].site.stack
    assert stack is not None, "a call has one"
    spec = rule.resolve(spec, stack)
    reason = rule.disagreement(spec, stack)
    return missed(f"can't be used here: {reason}") if reason else Match(spec, (), saved, tuple(misses), tuple(calls))


def call_edits(adapter: str, found: Match, dtype_of: Callable[[str], str]) -> list[Edit]:
    """The edits of a prompt adapter at its calls; `dtype_of` gives the adapter's dtype for that of a model."""
    rule = find_prompt_rule(found.spec)
    if rule is None:
        return []
    spec = cast(PromptSpec, found.spec)
    return [_call_edit(adapter, spec, rule, call, dtype_of(call.site.dtype)) for call in found.calls]


def _call_edit(adapter: str, spec: PromptSpec, rule: PromptRule[Any], call: CallSite, dtype: str) -> Edit:
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
    try:
        with torch.device("meta"):
            encoder = rule.encoder(spec)
            shape = tuple(encoder(torch.zeros(1, spec.rows, dtype=torch.long)).shape)
        names = [name for name, _ in encoder.named_parameters()]
    except Exception as error:  # A rule is anyone's code.
        raise RuleError(f"{where}: {type(error).__name__}: {error}") from error
    expected = (1, spec.rows, rule.width(spec))
    if shape != expected:
        raise RuleError(f"{where}: the encoder returns shape {shape}, not (1, rows, width) = {expected}")
    if spec.inference_mode and names != ["embedding.weight"]:
        raise RuleError(f"{where}: with inference_mode it has {names}, not the one parameter embedding.weight")
    if next(encoder.buffers(), None) is not None:
        raise RuleError(f"{where}: the encoder has buffers, which are not saved")
    return tuple(
        PlannedParam(name, f"{PROMPT_ENCODER}.{name}", tuple(parameter.shape), dtype, "encoder")
        for name, parameter in encoder.named_parameters()
    )
