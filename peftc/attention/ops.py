"""The row of the table of ops for attention modules: what finds them for a spec, and what splices rules around them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from peftc.architectures import family_of
from peftc.attention.sites import (
    AttentionSite,
    AttentionSpec,
    attended,
    first_of,
    projected,
    queries,
    unfit,
    width_of,
    with_first,
)
from peftc.edits import Miss
from peftc.graph.ops import Op
from peftc.graph.region import HOST, Source
from peftc.graph.sites import SiteIndex, dtype_name
from peftc.plan.claims import Claim, planned
from peftc.rewrite.holders import code_path
from peftc.rewrite.splice import Active, marked, traced
from peftc.rule import Bound, Rule

_NO_FOLD = "prompts that are attended to are no part of a weight, so there is nothing to fold"


def find(
    model: nn.Module,
    spec: AttentionSpec,
    rule: Rule[Any],
    index: SiteIndex,
    level: str,
    dtype_for: Callable[[str], str],
    flat: Source | None,
) -> Miss | tuple[AttentionSpec, tuple[Claim, ...]]:
    """What `rule` asks for at the last attention modules of `model`; a miss if there are none that it fits."""

    def missed(reason: str, field: str = "target_modules") -> Miss:
        return Miss("", field, str(getattr(spec, field, None)), reason, fatal=True)

    if level != "modules":
        return missed("needs capture='modules', which keeps the attention's own call", "peft_type")
    name = spec.target_modules or _default(model, type(spec))
    if not isinstance(name, str):
        return missed("has no default for this model: give the name of its attention modules (self_attn)")
    found = {fqn: module for fqn, module in model.named_modules() if f".{fqn}".endswith(f".{name}")}
    reason = next((reason for module in found.values() if (reason := unfit(module)) is not None), None)
    if not found or reason is not None:
        return missed(f"can't be adapted: {reason}" if found else "names no module")
    last = spec.last
    if last is None or last > len(found):
        return missed(f"asks for {last} of the {len(found)} attention modules; give how many, from the last")
    spec = spec.model_copy(update={"target_modules": name})
    chosen = list(found.items())[-last:]
    return spec, tuple(_claim(spec, rule, fqn, module, dtype_for) for fqn, module in chosen)


def _default(model: nn.Module, spec: type[AttentionSpec]) -> Any:
    family = family_of(model)
    return ((family.defaults_for(spec) if family is not None else None) or {}).get("target_modules")


def _claim(spec: AttentionSpec, rule: Rule[Any], fqn: str, module: nn.Module, dtype_for: Callable[[str], str]) -> Claim:
    first = next(module.parameters())
    dtype = dtype_name(first.dtype)
    site = AttentionSite(fqn, "attention_call", type(module).__name__, dtype, str(first.device), width=width_of(module))
    params = tuple(planned(name, param, dtype_for(dtype)) for name, param in rule.params(spec, site).items())
    return Claim(site, rule, ("output",), params, rule.constants(spec, site), _NO_FOLD)


def splice_attention(graph: fx.Graph, node: fx.Node, active: Sequence[Active]) -> None:
    """Put the `output` of the active rules behind the call `node` of an attention."""
    given = {str(n.target).lstrip("*"): n for n in graph.nodes if n.op == "placeholder"}
    users, tracer = list(node.users), GraphAppendingTracer(graph)
    with graph.inserting_before(node.next):
        host, hidden = graph.get_attr(HOST), given["hidden_states"]
        query = graph.call_function(queries, (host, hidden, given.get("position_embeddings")))
        y = graph.call_function(first_of, (node,))
        for one in active:
            with marked(graph, one, "output"):
                p = _bound(graph, one, tracer, host, query)
                y = traced(one, "output", fx.Proxy(hidden, tracer), fx.Proxy(y, tracer), p).node
        new = graph.call_function(with_first, (node, y))
    for user in users:
        user.replace_input_with(node, new)


def _bound(graph: fx.Graph, one: Active, tracer: Any, host: fx.Node, query: fx.Node) -> Bound:
    def op(function: Any, *first: fx.Node) -> Any:
        def call(x: fx.Proxy) -> fx.Proxy:
            return fx.Proxy(graph.call_function(function, (*first, x.node)), tracer)

        return call

    tensors = {
        param.name: fx.Proxy(graph.get_attr(f"{one.name}.{code_path(param.key)}"), tracer) for param in one.edit.params
    }
    ops = {"attend": op(attended, host, query), "project": op(projected, host)}
    return Bound({**tensors, **one.edit.constants, **ops})


OPS = (
    Op(
        "attention_call",
        find=find,
        splice=splice_attention,
        site=AttentionSite,
        unmixable="its prompts are attended to by all rows",
    ),
)
