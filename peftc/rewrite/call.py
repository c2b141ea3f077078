"""Splicing prompt methods into a call: the region of a model, with ops around the call of what it was before.

All prompt adapters of a call are spliced at once, because their virtual tokens share one mask and one row of positions:
cached ones first, then embedded ones, each in load order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from peftc.graph.region import OPAQUE, invoke
from peftc.plan import Edit
from peftc.plan.calls import PROMPT_ENCODER
from peftc.rewrite import virtual

# Arguments with one entry per token, and what they say of virtual tokens.
_PER_TOKEN: Mapping[str, int] = {"token_type_ids": 0, "mm_token_type_ids": 0}


def splice_call(graph: fx.Graph, node: fx.Node, edits: Sequence[Edit]) -> None:
    """Rewrite the arguments, and if need be the output, of the call `node` of an opaque host."""
    given = {str(n.target).lstrip("*"): n for n in graph.nodes if n.op == "placeholder"}
    before = node.args[0] if node.target is invoke else node
    assert isinstance(before, fx.Node), "invoke calls a module"
    with graph.inserting_before(before):
        if not any(edit.virtual for edit in edits):
            mask, memory = given["encoder_attention_mask"], given["encoder_hidden_states"]
            _replace(node, given, {"encoder_attention_mask": graph.call_function(virtual.widen_memory, (mask, memory))})
            return
        at, changed = _arguments(graph, given, edits)
    _replace(node, given, changed)
    if any(edit.slot == "past" for edit in edits):
        node = _with_prefix(graph, node, given)
    elif "past_key_values" in given:
        node = _follow(graph, node, virtual.remember, at)
    if any(edit.constants["drop"] for edit in edits):
        _follow(graph, node, virtual.drop, at)


def _arguments(graph: fx.Graph, given: Mapping[str, fx.Node], edits: Sequence[Edit]) -> tuple[fx.Node, dict[str, Any]]:
    """The call's progress, and its new arguments by name."""
    embeds = [edit for edit in edits if edit.slot == "embeds"]
    prefixes = [edit for edit in edits if edit.slot == "past"]
    half = "decoder_" if prefixes and "decoder_input_ids" in given else ""
    inputs = [f"{half}input_ids", f"{half}inputs_embeds", *(["labels", "input_ids", "inputs_embeds"] if half else [])]
    held = tuple((edit.adapter, edit.slot, edit.constants["num_virtual_tokens"]) for edit in edits if edit.virtual)
    past = given.get("past_key_values")
    at = graph.call_function(virtual.progress, (held, past, *(given[n] for n in inputs if n in given)))
    changed: dict[str, Any] = {}
    if embeds:
        changed |= _embedded(graph, at, given, embeds)
    if prefixes:
        changed["past_key_values"] = _prefixed(graph, at, given, prefixes, bool(half))
        if "use_cache" in given:
            changed["use_cache"] = True  # Some models pass the cache on only then; the caller's wish is met afterwards.
    for name, op in ((f"{half}attention_mask", virtual.widen_mask), (f"{half}position_ids", virtual.shift_positions)):
        if name in given:
            changed[name] = graph.call_function(op, (at, given[name]))
    return at, changed


def _embedded(graph: fx.Graph, at: fx.Node, given: Mapping[str, fx.Node], edits: Sequence[Edit]) -> dict[str, fx.Node]:
    embedding = graph.get_attr(str(edits[0].constants["embedding"]))
    encoders = tuple(
        (_encoder(graph, edit), edit.constants["rows"], edit.constants["num_virtual_tokens"]) for edit in edits
    )
    ids, fills = given["input_ids"], dict(_PER_TOKEN)
    if any(edit.constants["task_type"] == "CAUSAL_LM" for edit in edits):
        fills["labels"] = virtual.IGNORED
    changed = {
        "input_ids": graph.call_function(virtual.unless_first, (at, ids)),
        "inputs_embeds": graph.call_function(virtual.prepend, (at, embedding, ids, given["inputs_embeds"], encoders)),
    }
    for name, fill in fills.items():
        if name in given:
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
    return graph.call_function(prefix_cache, (at, graph.get_attr(OPAQUE), given["past_key_values"], double, prefixes))


def _encoder(graph: fx.Graph, edit: Edit) -> fx.Node:
    return graph.get_attr(f"{PROMPT_ENCODER}.{edit.adapter}")


def _replace(node: fx.Node, given: Mapping[str, fx.Node], changed: Mapping[str, Any]) -> None:
    """Let the call take the changed arguments."""
    new = {given[name]: value for name, value in changed.items()}

    def swap(argument: fx.Node) -> Any:
        return new.get(argument, argument)

    node.args = fx.map_arg(node.args, swap)
    node.kwargs = fx.map_arg(node.kwargs, swap)


def _with_prefix(graph: fx.Graph, node: fx.Node, given: Mapping[str, fx.Node]) -> fx.Node:
    """The call as one that gradient checkpointing leaves the cache to, and that gives it only to who wants it."""
    from peftc.rewrite.prefix_cache import call_with_prefix, withhold

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
    return _follow(graph, node, withhold, base, given["past_key_values"], given.get("use_cache"), rest)


def _follow(graph: fx.Graph, node: fx.Node, op: Any, *more: Any) -> fx.Node:
    """Put `op` on the output of `node`, in front of everything that used it."""
    users = list(node.users)
    with graph.inserting_before(node.next):
        new = graph.call_function(op, (node, *more))
    for user in users:
        user.replace_input_with(node, new)
    return new
