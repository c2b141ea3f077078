"""Splicing prompt methods into a call: the region of a model, with ops around the call of what it was before.

All prompt adapters of a call are spliced at once, because their virtual tokens share one mask and one row of positions:
cached ones first, then embedded ones, each in load order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from peftc.graph.region import invoke
from peftc.plan import Edit
from peftc.plan.calls import PROMPT_ENCODER
from peftc.rewrite import virtual

CALL_SLOTS = ("embeds", "past", "memory")
# Arguments with one entry per token that virtual tokens extend, and with what.
_PER_TOKEN: Mapping[str, int] = {"labels": virtual.IGNORED, "token_type_ids": 0, "mm_token_type_ids": 0}


def splice_call(graph: fx.Graph, node: fx.Node, edits: Sequence[Edit]) -> None:
    """Rewrite the arguments, and if need be the output, of the call `node` of an opaque host."""
    given = {str(n.target).lstrip("*"): n for n in graph.nodes if n.op == "placeholder"}
    before = node.args[0] if node.target is invoke else node
    assert isinstance(before, fx.Node), "invoke calls a module"
    with graph.inserting_before(before):
        if all(edit.slot == "memory" for edit in edits):
            mask, memory = given["encoder_attention_mask"], given["encoder_hidden_states"]
            _replace(node, given, {"encoder_attention_mask": graph.call_function(virtual.widen_memory, (mask, memory))})
            return
        at, changed = _arguments(graph, given, edits)
    _replace(node, given, changed)
    if "past_key_values" in changed:
        node = _call_with_prefix(graph, node)
        if "use_cache" in given:
            node = _follow(graph, node, virtual.withhold, at, given["use_cache"], given["past_key_values"])
    elif "past_key_values" in given:
        node = _follow(graph, node, virtual.remember, at)
    if any(edit.constants["drop"] for edit in edits):
        _follow(graph, node, virtual.drop, at)


def call_methods(cls: type[nn.Module], edits: Sequence[Edit]) -> dict[str, Callable[[Any], Any]]:
    """The methods of `cls` that must know of virtual tokens too (see peftc.rewrite.host.Code)."""
    cached = any(edit.slot in ("embeds", "past") for edit in edits)
    return {_PREPARE: _count_virtual} if cached and callable(getattr(cls, _PREPARE, None)) else {}


_PREPARE = "prepare_inputs_for_generation"


def _count_virtual(original: Any) -> Any:
    """`generate` goes on from a given cache with the tokens that are not in it, and takes its length for theirs."""

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = kwargs.get("next_sequence_length")
        if kwargs.get("is_first_iteration") and number is not None:
            kwargs["next_sequence_length"] = number + virtual.held_by(kwargs.get("past_key_values"))
        return original(self, *args, **kwargs)

    return prepare


def _follow(graph: fx.Graph, node: fx.Node, op: Any, at: fx.Node, *more: fx.Node) -> fx.Node:
    """Put `op` after `node`, in front of everything that used it."""
    users = list(node.users)
    with graph.inserting_after(node):
        new = graph.call_function(op, (at, node, *more))
    for user in users:
        user.replace_input_with(node, new)
    return new


def _arguments(
    graph: fx.Graph, given: Mapping[str, fx.Node], edits: Sequence[Edit]
) -> tuple[fx.Node, dict[str, fx.Node]]:
    """The call's progress, and its new arguments by name."""
    embeds = [edit for edit in edits if edit.slot == "embeds"]
    prefixes = [edit for edit in edits if edit.slot == "past"]
    half = "decoder_" if prefixes and "decoder_input_ids" in given else ""
    inputs = [f"{half}input_ids", f"{half}inputs_embeds", *(["labels", "input_ids", "inputs_embeds"] if half else [])]
    counts = [sum(int(edit.constants["num_virtual_tokens"]) for edit in group) for group in (embeds, prefixes)]
    past = given.get("past_key_values")
    at = graph.call_function(virtual.progress, (*counts, past, *(given[n] for n in inputs if n in given)))
    changed: dict[str, fx.Node] = {}
    if embeds:
        changed |= _embedded(graph, at, given, embeds)
    if prefixes:
        changed["past_key_values"] = _prefixed(graph, at, given, prefixes, bool(half))
    for name, op in ((f"{half}attention_mask", virtual.widen_mask), (f"{half}position_ids", virtual.shift_positions)):
        if name in given:
            changed[name] = graph.call_function(op, (at, given[name]))
    return at, changed


def _embedded(graph: fx.Graph, at: fx.Node, given: Mapping[str, fx.Node], edits: Sequence[Edit]) -> dict[str, fx.Node]:
    embedding = graph.get_attr(str(edits[0].constants["embedding"]))
    encoders = tuple(
        (_encoder(graph, edit), edit.constants["rows"], edit.constants["num_virtual_tokens"]) for edit in edits
    )
    ids = given["input_ids"]
    changed = {
        "input_ids": graph.call_function(virtual.unless_first, (at, ids)),
        "inputs_embeds": graph.call_function(virtual.prepend, (at, embedding, ids, given["inputs_embeds"], encoders)),
    }
    for name, fill in _PER_TOKEN.items():
        if name in given and (name != "labels" or edits[0].constants["task_type"] == "CAUSAL_LM"):
            changed[name] = graph.call_function(virtual.lead, (at, given[name], fill))
    if "logits_to_keep" in given:
        changed["logits_to_keep"] = graph.call_function(virtual.shift_indices, (at, given["logits_to_keep"]))
    return changed


def _prefixed(
    graph: fx.Graph, at: fx.Node, given: Mapping[str, fx.Node], edits: Sequence[Edit], double: bool
) -> fx.Node:
    from peftc.rewrite.prefix_cache import prefix_cache

    fields = ("num_virtual_tokens", "num_layers", "num_attention_heads", "num_transformer_submodules")
    prefixes = tuple((_encoder(graph, edit), *(edit.constants[field] for field in fields)) for edit in edits)
    host = graph.get_attr("base_layer")
    return graph.call_function(prefix_cache, (at, host, given["past_key_values"], double, prefixes))


def _encoder(graph: fx.Graph, edit: Edit) -> fx.Node:
    return graph.get_attr(f"{PROMPT_ENCODER}.{edit.adapter}")


def _replace(node: fx.Node, given: Mapping[str, fx.Node], changed: Mapping[str, fx.Node]) -> None:
    """Let the call take the changed arguments."""
    new = {given[name]: value for name, value in changed.items()}

    def swap(argument: fx.Node) -> Any:
        return new.get(argument, argument)

    node.args = fx.map_arg(node.args, swap)
    node.kwargs = fx.map_arg(node.kwargs, swap)


def _call_with_prefix(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The call as one that gradient checkpointing does not take the cache from."""
    from peftc.rewrite.prefix_cache import call_with_prefix

    if node.target is invoke:
        node.target = call_with_prefix
        return node
    with graph.inserting_before(node):
        base = graph.get_attr(str(node.target))
        new = graph.call_function(call_with_prefix, (base, node.args, dict(node.kwargs)))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
