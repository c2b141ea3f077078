"""How prompt methods are planned: which calls they enter, and what is added there."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from peftc.edits import Edit, Miss, PlannedParam
from peftc.errors import RuleError
from peftc.graph.region import Source
from peftc.graph.sites import SiteIndex
from peftc.plan.claims import Claim
from peftc.prompts.calls import Call, find_calls
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import PromptSpec
from peftc.rule import Constant

_NO_FOLD = "virtual tokens are no part of a weight, so there is nothing to fold"


def is_virtual(edit: Edit) -> bool:
    """Whether virtual tokens enter at `edit`, from an encoder of its own."""
    return isinstance(edit.rule, PromptRule) and edit.slots[0] in ("embeds", "past")


def find(
    model: nn.Module,
    spec: PromptSpec,
    rule: PromptRule[Any],
    index: SiteIndex,
    level: str,
    dtype_for: Callable[[str], str],
    flat: Source | None,
) -> Miss | tuple[PromptSpec, tuple[Claim, ...]]:
    """What `rule` asks for at the calls of `model`, and the spec with what it leaves open; a miss if there is no place."""

    def missed(reason: str, field: str = "peft_type") -> Miss:
        return Miss("", field, str(getattr(spec, field)), reason, fatal=True)

    if spec.task_type is None:
        tasks = "CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION"
        return missed(f"leaves open what becomes of labels, positions and heads; give {tasks}", "task_type")
    calls = find_calls(model, rule.at, spec.task_type, index)
    if isinstance(calls, str):
        return missed(f"can't be used here: {calls}")
    if level != "modules":
        reason = _no_way_in(rule, calls, flat)
        if reason:
            return missed(reason)
    stack = calls[0].site.stack
    assert stack is not None, "a call has one"
    resolved = cast(PromptSpec, rule.resolve(spec, stack))
    reason = rule.disagreement(resolved, stack)
    if reason:
        return missed(f"can't be used here: {reason}")
    return resolved, tuple(_claim(resolved, rule, call, dtype_for(call.site.dtype)) for call in calls)


def _no_way_in(rule: PromptRule[Any], calls: Sequence[Call], flat: Source | None) -> str | None:
    """Why virtual tokens can't enter with the inputs of a whole program and stay in, or None."""
    elsewhere = (
        "needs capture='modules', which keeps the model's own call; export(…, to='pt2', adapters='inside') makes a program"
        " with it from there"
    )
    if flat is None or any(call.site.fqn or call.drop for call in calls):
        return elsewhere
    if rule.at == "embeds":
        return None
    caches = flat.signature.caches if flat.signature is not None else ()
    cache = next((cache for cache in caches if cache.name == "past_key_values"), None)
    if cache is None:
        return (
            f"{elsewhere}. Or capture it with past_key_values that the model has filled, and a mask that covers them, too:"
            " with torch.no_grad(): inputs['past_key_values'] = model(**few).past_key_values (few: inputs without labels)"
        )
    if any(_reads(one, cache.name) < len(cache.leaves) for one in (flat, flat.training) if one is not None):
        return (
            "has no effect in this program, which does not read the past_key_values that it is given: capture it without"
            " gradient checkpointing and with config.use_cache=True, or use capture='modules'"
        )
    return None


def _reads(flat: Source, cache: str) -> int:
    """How many tensors of a cache a program reads."""
    from peftc.graph.caches import tensor_of  # Late, as transformers takes its time.

    places = [node for node in flat.graph.nodes if node.op == "placeholder" and node.target == cache]
    return sum(user.target is tensor_of for place in places for user in place.users)


def _claim(spec: PromptSpec, rule: PromptRule[Any], call: Call, dtype: str) -> Claim:
    """What `rule` asks for at `call`. Raises RuleError if its encoder does not return what the contract says."""
    constants: dict[str, Constant] = {
        "num_virtual_tokens": spec.num_virtual_tokens,
        "task_type": str(spec.task_type),
        "embedding": call.site.stack.embedding if call.site.stack is not None else "",
        "drop": call.drop,
        **rule.constants(spec, call.site),
    }
    params: tuple[PlannedParam, ...] = ()
    if call.slot == "past":
        constants |= {
            field: spec.fact(field) for field in ("num_layers", "num_attention_heads", "num_transformer_submodules")
        }
    if call.slot != "memory":
        constants["rows"] = spec.rows
        params = _encoder_params(spec, rule, dtype)
    return Claim(call.site, rule, (call.slot,), params, constants, _NO_FOLD)


def _encoder_params(spec: PromptSpec, rule: PromptRule[Any], dtype: str) -> tuple[PlannedParam, ...]:
    where = f"rule {rule.name!r} ({type(rule).__name__}.encoder)"
    try:
        with torch.device("meta"):
            encoder = rule.encoder(spec)
            given = {name: torch.zeros(1, dtype=torch.long) for name in rule.asked}
            shape = tuple(encoder(torch.zeros(1, spec.rows, dtype=torch.long), **given).shape)
        names = [name for name, _ in encoder.named_parameters()]
    except Exception as error:  # A rule is anyone's code.
        raise RuleError(f"{where}: {type(error).__name__}: {error}") from error
    expected = (1, spec.rows, rule.width(spec))
    if shape != expected:
        raise RuleError(f"{where}: the encoder returns shape {shape}, not (1, rows, width) = {expected}")
    if spec.inference_mode and names != ["embedding.weight"] and not rule.asked:
        raise RuleError(f"{where}: with inference_mode it has {names}, not the one parameter embedding.weight")
    if next(encoder.buffers(), None) is not None:
        raise RuleError(f"{where}: the encoder has buffers, which are not saved")
    return tuple(
        PlannedParam(name, name, tuple(parameter.shape), dtype, "encoder", trainable=parameter.requires_grad)
        for name, parameter in encoder.named_parameters()
    )
