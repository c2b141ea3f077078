"""Splicing prompt methods into a call: the region of a model, with ops around the call of what it was before.

All prompt adapters of a call are spliced at once, because their virtual tokens share one mask and one row of positions:
cached ones first, then embedded ones, each in load order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx
from torch.utils import _pytree as pytree

from peftc.edits import Edit
from peftc.errors import CaptureError
from peftc.graph.calling import Signature, guarded
from peftc.graph.region import HOST, OPAQUE, invoke
from peftc.prompts import virtual
from peftc.prompts.calls import CallSite
from peftc.prompts.find import is_virtual
from peftc.prompts.rule import PromptRule
from peftc.rewrite.splice import Active, follow

# Arguments with one entry per token, and what they say of virtual tokens.
_PER_TOKEN: Mapping[str, int] = {"token_type_ids": 0, "mm_token_type_ids": 0}


def splice_call(graph: fx.Graph, node: fx.Node, active: Sequence[Active]) -> None:
    """Rewrite the arguments, and if need be the output, of the call `node` of an opaque host."""
    edits = [one.edit for one in active]
    given = _inputs(graph)
    before = node.args[0] if node.target is invoke else node
    assert isinstance(before, fx.Node), "invoke calls a module"
    with graph.inserting_before(before):
        if not any(is_virtual(edit) for edit in edits):
            mask, memory = given["encoder_attention_mask"], given["encoder_hidden_states"]
            _replace(node, given, {"encoder_attention_mask": graph.call_function(virtual.widen_memory, (mask, memory))})
            return
        at, changed = _arguments(graph, given, active)
    prefixed = any(edit.slots == ("past",) for edit in edits)
    if prefixed and "use_cache" in given:
        changed["use_cache"] = True  # Some models pass the cache on only then; the caller's wish is met afterwards.
    _replace(node, given, changed)
    if prefixed:
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


def splice_inputs(graph: fx.Graph, active: Sequence[Active], signature: Signature) -> None:
    """Put virtual tokens before the inputs of a whole program. Raises CaptureError if it has none that they can enter."""
    given = _inputs(graph)
    for one in active:
        if one.edit.slots == ("embeds",):
            _require_embeds(one, given, signature)
    last = max(number for number, node in enumerate(graph.nodes) if node.op == "placeholder")
    after = list(graph.nodes)[last + 1 :]
    with graph.inserting_before(after[0]):
        _, changed = _arguments(graph, given, active)
        if signature.guards:
            inputs = pytree.tree_unflatten([given[leaf.name] for leaf in signature.leaves], signature.inputs)
            inputs |= {one.name: given[one.name] for one in signature.caches}
            # What was taken for true of the inputs is to be true of what the model sees in their place.
            first = next(iter(changed))
            changed[first] = graph.call_function(guarded, (changed[first], signature.guards, {**inputs, **changed}))
    for name, value in changed.items():
        given[name].replace_all_uses_with(value, delete_user_cb=set(after).__contains__)


def _inputs(graph: fx.Graph) -> dict[str, fx.Node]:
    return {str(n.target).lstrip("*"): n for n in graph.nodes if n.op == "placeholder"}


def _require_embeds(one: Active, given: Mapping[str, fx.Node], signature: Signature) -> None:
    """Raise CaptureError if tokens can't be put before the embedded ones of a program."""
    known = ("inputs_embeds", "attention_mask", "position_ids", "labels", "num_items_in_batch", *_PER_TOKEN)
    wrong = [name for name in given if name not in (*known, *(cache.name for cache in signature.caches))]
    if wrong or "inputs_embeds" not in given:
        raise CaptureError(
            f"{one.edit.adapter!r}: virtual tokens enter a program with inputs_embeds, and this one was captured with"
            f" {', '.join(given)}. Compile with inputs={{'inputs_embeds': model.get_input_embeddings()(ids),"
            " 'attention_mask': mask}, and labels if need be; or with capture='modules'"
        )
    if "labels" in given and _has_loss(one.edit):
        raise CaptureError(
            f"{one.edit.adapter!r} has a loss of its own, and this program computes the model's: leave labels out of"
            " inputs, or compile with capture='modules'"
        )


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
    half = "decoder_" if prefixes and _of_encoder_decoder(prefixes[0]) else ""
    inputs = [f"{half}input_ids", f"{half}inputs_embeds", *(["labels", "input_ids", "inputs_embeds"] if half else [])]
    past = given.get("past_key_values")
    at = graph.call_function(virtual.progress, (held, past, *(given[n] for n in inputs if n in given)))
    changed: dict[str, Any] = {}
    if embeds:
        changed |= _embedded(graph, at, given, embeds)
    if prefixes:
        changed["past_key_values"] = _prefixed(graph, at, given, prefixes, bool(half))
    if f"{half}attention_mask" in given:
        mask = given[f"{half}attention_mask"]
        changed[f"{half}attention_mask"] = graph.call_function(virtual.widen_mask, (at, mask, graph.get_attr(HOST)))
    if f"{half}position_ids" in given:
        positions = given[f"{half}position_ids"]
        changed[f"{half}position_ids"] = graph.call_function(virtual.shift_positions, (at, positions))
    return at, changed


def _of_encoder_decoder(active: Active) -> bool:
    return isinstance(active.site, CallSite) and active.site.stack is not None and active.site.stack.is_encoder_decoder


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
    return graph.call_function(prefix_cache, (at, graph.get_attr(HOST), given["past_key_values"], double, prefixes))


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
