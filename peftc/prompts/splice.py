"""Splicing prompt methods into a call: the region of a model, with ops around the call of what it was before.

All prompt adapters of a call are spliced at once, because their virtual tokens share one mask and one row of positions:
cached ones first, then embedded ones, each in load order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx

from peftc.edits import Edit
from peftc.errors import CaptureError
from peftc.graph.region import HOST, OPAQUE, invoke
from peftc.prompts import virtual
from peftc.prompts.find import is_virtual
from peftc.prompts.rule import PromptRule
from peftc.rewrite.splice import Active, follow

# Arguments with one entry per token, and what they say of virtual tokens.
_PER_TOKEN: Mapping[str, int] = {"token_type_ids": 0, "mm_token_type_ids": 0}


def splice_call(graph: fx.Graph, node: fx.Node | None, active: Sequence[Active]) -> None:
    """Rewrite the arguments, and if need be the output, of the call `node` of an opaque host; without one, the inputs of a
    whole program. Raises CaptureError if that takes none that virtual tokens can enter.
    """
    edits = [one.edit for one in active]
    given = {str(n.target).lstrip("*"): n for n in graph.nodes if n.op == "placeholder"}
    if node is None:
        _splice_inputs(graph, given, active)
        return
    before = node.args[0] if node.target is invoke else node
    assert isinstance(before, fx.Node), "invoke calls a module"
    with graph.inserting_before(before):
        if not any(is_virtual(edit) for edit in edits):
            mask, memory = given["encoder_attention_mask"], given["encoder_hidden_states"]
            _replace(node, given, {"encoder_attention_mask": graph.call_function(virtual.widen_memory, (mask, memory))})
            return
        at, changed = _arguments(graph, given, active)
    _replace(node, given, changed)
    if any(edit.slots == ("past",) for edit in edits):
        node = _with_prefix(graph, node, given)
    elif "past_key_values" in given:
        node = follow(graph, node, virtual.remember, at)
    weighing = [one for one in active if _has_loss(one.edit)]
    if weighing and "labels" in given:
        with graph.inserting_before(node):
            part = graph.get_attr(weighing[0].name)
        node = follow(graph, node, virtual.weigh, at, given["labels"], part)
    if any(edit.constants["drop"] for edit in edits):
        follow(graph, node, virtual.drop, at)


def _splice_inputs(graph: fx.Graph, given: Mapping[str, fx.Node], active: Sequence[Active]) -> None:
    """Put virtual tokens before the inputs of a whole program."""
    known = ("inputs_embeds", "attention_mask", "position_ids", "labels", "num_items_in_batch", *_PER_TOKEN)
    wrong = [name for name in given if name not in known]
    if wrong or "inputs_embeds" not in given:
        raise CaptureError(
            f"{active[0].edit.adapter!r}: virtual tokens enter a program with inputs_embeds, and this one was captured with"
            f" {', '.join(given)}. Compile with inputs={{'inputs_embeds': model.get_input_embeddings()(ids),"
            " 'attention_mask': mask}, and labels if need be; or with capture='modules'"
        )
    if "labels" in given and any(_has_loss(one.edit) for one in active):
        raise CaptureError(
            f"{active[0].edit.adapter!r} has a loss of its own, and this program computes the model's: leave labels out of"
            " inputs, or compile with capture='modules'"
        )
    last = max(number for number, node in enumerate(graph.nodes) if node.op == "placeholder")
    after = list(graph.nodes)[last + 1 :]
    with graph.inserting_before(after[0]):
        _, changed = _arguments(graph, given, active)
    for name, value in changed.items():
        given[name].replace_all_uses_with(value, delete_user_cb=set(after).__contains__)


def _has_loss(edit: Edit) -> bool:
    return is_virtual(edit) and cast(Any, type(edit.rule)).loss is not PromptRule.loss


def _arguments(
    graph: fx.Graph, given: Mapping[str, fx.Node], active: Sequence[Active]
) -> tuple[fx.Node, dict[str, Any]]:
    """The call's progress, and its new arguments by name."""
    embeds = [one for one in active if one.edit.slots == ("embeds",)]
    prefixes = [one for one in active if one.edit.slots == ("past",)]
    held = tuple(
        (graph.get_attr(f"{one.name}.edit.adapter"), one.edit.slots[0], one.edit.constants["num_virtual_tokens"])
        for one in active
        if is_virtual(one.edit)
    )
    half = "decoder_" if prefixes and "decoder_input_ids" in given else ""
    inputs = [f"{half}input_ids", f"{half}inputs_embeds", *(["labels", "input_ids", "inputs_embeds"] if half else [])]
    past = given.get("past_key_values")
    at = graph.call_function(virtual.progress, (held, past, *(given[n] for n in inputs if n in given)))
    changed: dict[str, Any] = {}
    if embeds:
        changed |= _embedded(graph, at, given, embeds)
    if prefixes:
        changed["past_key_values"] = _prefixed(graph, at, given, prefixes, bool(half))
        if "use_cache" in given:
            changed["use_cache"] = True  # Some models pass the cache on only then; the caller's wish is met afterwards.
    if f"{half}attention_mask" in given:
        mask = given[f"{half}attention_mask"]
        changed[f"{half}attention_mask"] = graph.call_function(virtual.widen_mask, (at, mask, graph.get_attr(HOST)))
    if f"{half}position_ids" in given:
        positions = given[f"{half}position_ids"]
        changed[f"{half}position_ids"] = graph.call_function(virtual.shift_positions, (at, positions))
    return at, changed


def _embedded(
    graph: fx.Graph, at: fx.Node, given: Mapping[str, fx.Node], active: Sequence[Active]
) -> dict[str, fx.Node]:
    embedding = graph.get_attr(f"{HOST}.{active[0].edit.constants['embedding']}")
    parts = tuple(graph.get_attr(one.name) for one in active)
    ids, fills = given.get("input_ids"), dict(_PER_TOKEN)
    if any(one.edit.constants["task_type"] == "CAUSAL_LM" for one in active):
        fills["labels"] = virtual.IGNORED
    changed = {
        "inputs_embeds": graph.call_function(virtual.prepend, (at, embedding, ids, given["inputs_embeds"], parts))
    }
    if ids is not None:
        changed["input_ids"] = graph.call_function(virtual.unless_first, (at, ids))
    for name, fill in fills.items():
        if name in given:
            changed[name] = graph.call_function(virtual.lead, (at, given[name], fill))
    if "logits_to_keep" in given:
        changed["logits_to_keep"] = graph.call_function(virtual.shift_indices, (at, given["logits_to_keep"]))
    return changed


def _prefixed(
    graph: fx.Graph, at: fx.Node, given: Mapping[str, fx.Node], active: Sequence[Active], double: bool
) -> fx.Node:
    from peftc.prompts.prefix_cache import prefix_cache

    fields = ("num_virtual_tokens", "num_layers", "num_attention_heads", "num_transformer_submodules")
    prefixes = tuple((_encoder(graph, one), *(one.edit.constants[field] for field in fields)) for one in active)
    return graph.call_function(prefix_cache, (at, graph.get_attr(OPAQUE), given["past_key_values"], double, prefixes))


def _encoder(graph: fx.Graph, active: Active) -> fx.Node:
    return graph.get_attr(f"{active.name}.own")


def _replace(node: fx.Node, given: Mapping[str, fx.Node], changed: Mapping[str, Any]) -> None:
    """Let the call take the changed arguments."""
    new = {given[name]: value for name, value in changed.items()}

    def swap(argument: fx.Node) -> Any:
        return new.get(argument, argument)

    node.args = fx.map_arg(node.args, swap)
    node.kwargs = fx.map_arg(node.kwargs, swap)


def _with_prefix(graph: fx.Graph, node: fx.Node, given: Mapping[str, fx.Node]) -> fx.Node:
    """The call as one that gradient checkpointing leaves the cache to, and that gives it only to who wants it."""
    from peftc.prompts.prefix_cache import call_with_prefix, withhold

    with graph.inserting_before(node):
        base = graph.get_attr(OPAQUE)
        if node.target is not invoke:
            new = graph.call_function(call_with_prefix, (base, node.args, dict(node.kwargs)))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            node = new
        else:
            node.target = call_with_prefix
    rest = next((n for n in given.values() if str(n.target).startswith("**")), None)
    return follow(graph, node, withhold, base, given["past_key_values"], given.get("use_cache"), rest)
