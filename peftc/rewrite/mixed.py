"""Mixed batches: several adapters in one batch, one per row.

For the time of a call every host of these adapters runs a code that serves all of them. Where they are of one kind whose
term is made of matrix products (LoRA on linear sites), the rule's own function is traced on stacked parameters and its
products become batched ones; elsewhere the code of every adapter runs on its rows (see peftc.rewrite.route).
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.nn import functional as F

from peftc.errors import AdapterError, MergeError
from peftc.graph.region import OPAQUE, Region, Source, call, form_of, operand, parameters_of
from peftc.graph.sites import transformers_config
from peftc.plan import MODULES_TO_SAVE, Edit
from peftc.registry import find_rule
from peftc.rewrite import route as ops
from peftc.rewrite.host import Code, original_class
from peftc.rewrite.program import Program
from peftc.rewrite.route import BASE, Route, current
from peftc.rewrite.switch import brings, install_layout, layout
from peftc.rule import Bound, Rule

_KEPT = 64  # Layouts of sets of names that are remembered.


@contextmanager
def mixed(program: Program, names: Any, several: bool = False) -> Generator[None]:
    """Let the model's calls use adapter `names[i]` for row i, or with `several` for as many rows as each then has (beams).

    Raises AdapterError or MergeError before anything runs.
    """
    rows = _checked(program, names)
    hosts = _mixed_layout(program, frozenset(rows) - {BASE})
    route = Route(rows, _codes(program, hosts, rows), torch.is_grad_enabled(), _is_rows_first(program))
    with _entered(program, hosts, route), _watched(program.base, route, several), _bound(program, hosts, route):
        yield


def _checked(program: Program, names: Any) -> tuple[str, ...]:
    if (
        not isinstance(names, list | tuple)
        or not all(isinstance(n, str) for n in cast("list[Any]", names))
        or not names
    ):
        raise AdapterError(f"adapter_names: expected a list with one adapter name per row, got {names!r}")
    rows = tuple(cast("list[str]", names))
    for name in dict.fromkeys(rows):
        if name != BASE and name not in program.plan.adapters:
            known = ", ".join([*program.plan.adapters, BASE])
            raise AdapterError(f"adapter_names: no adapter {name!r}; there are {known}")
        reason = _unmixable(program, name) if name != BASE else None
        if reason is not None:
            raise AdapterError(f"adapter_names: {name!r} can't share a batch: {reason}")
    if program.plan.capture != "modules":
        raise AdapterError("adapter_names: needs capture='modules'; one flat graph runs all rows alike")
    if _sequence_first(program):
        raise AdapterError("adapter_names: this model has modules that take positions before rows (batch_first=False)")
    if program.merged:
        raise MergeError(f"adapter_names: {', '.join(program.merged)} merged; call unmerge_adapter() first")
    if not program.enabled:
        raise AdapterError("adapter_names: adapters are disabled; call enable_adapters(), or leave disable_adapter()")
    if program.journal.training or any(program.journal.present.values()):
        raise AdapterError(
            "adapter_names: an active adapter has put biases or embeddings of its own into the base; set_adapter([]) first"
        )
    return rows


def _unmixable(program: Program, name: str) -> str | None:
    """Why adapter `name` can't be one of several in a batch."""
    config = transformers_config(program.base)
    several = config is not None and config.get_text_config() is not config
    if any(tensor.adapter == name for tensor in program.plan.trained):
        return "it trains biases of the base model, which all rows share"
    if any(brings(program, tensor, name) for tensor in program.journal.present):
        return "it brings embeddings of its own, in the place of those that all rows share"
    for edit in program.edits[name]:
        if program.plan.sites[edit.site].kind == "call":
            return "a prompt method changes the length of every row"
        if program.plan.sites[edit.site].kind == "parameter":
            return f"{edit.site} is adapted as a weight, which all rows share"
        if ".experts." in edit.site:
            return f"{edit.site} gets the tokens that were routed to it, whichever sequence they are of"
        if several and _SEEN.search(edit.site):
            return f"{edit.site} gets images or sounds, and each may belong to any row"
    return None


# Parts of models with several inputs, of which the batch is that of the text.
_SEEN = re.compile(r"(^|[._])(vision|visual|image|audio|video|multi_modal)")
# Architectures that turn (rows, positions) around inside.
_TURNING = ("longformer", "led", "xlnet", "fsmt")


def _sequence_first(program: Program) -> bool:
    config = transformers_config(program.base)
    if config is not None and config.model_type in _TURNING:
        return True
    ordered = (m for m in program.base.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase))
    return any(not module.batch_first for module in ordered)


def _is_rows_first(program: Program) -> bool:
    """Whether all modules are known to take rows first: those of transformers do, but for a few."""
    return transformers_config(program.base) is not None


@contextmanager
def _entered(program: Program, hosts: dict[str, Code], route: Route) -> Generator[None]:
    """Run the hosts' mixed codes under `route`; what they ran before, afterwards."""
    if program.routed:
        raise AdapterError("adapter_names: another such call of this model is running; one at a time")
    program.routed = True
    token = current.set(route)
    try:
        install_layout(program, hosts)
        yield
    finally:
        current.reset(token)
        program.routed = False
        install_layout(program, layout(program, program.spliced))


@contextmanager
def _watched(base: nn.Module, route: Route, several: bool) -> Generator[None]:
    """Note the length of the sequences of every call of the model, and refuse a batch of another size."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
        first = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
        rows, count = (0 if first is None else first.shape[0]), len(route.names)
        if first is None or rows % count or (rows != count and not several):
            raise AdapterError(f"adapter_names: {count} names for a batch of {rows}")
        tensors = [value for value in given if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows]
        route.rows, route.lengths = rows, frozenset(tensor.shape[1] for tensor in tensors)
        route.inputs = frozenset(tensor.data_ptr() for tensor in tensors)

    handle = base.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _bound(program: Program, hosts: dict[str, Code], route: Route) -> Generator[None]:
    """Let checkpointed layers of transformers take the route along to the backward pass, where they run again."""
    name = "_gradient_checkpointing_func"
    layers = [module for module in program.base.modules() if name in module.__dict__]

    def again(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, route.bound = route.bound, True
        try:
            if current.get(None) is route:
                return run(*args, **kwargs)
            with _entered(program, hosts, route):
                return run(*args, **kwargs)
        finally:
            route.bound = before

    def checkpoint(function: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(partial(again, run), *args, **kwargs)

    functions = [layer.__dict__[name] for layer in layers]
    for layer, function in zip(layers, functions, strict=True):
        layer.__dict__[name] = partial(checkpoint, function)
    try:
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.__dict__[name] = function


def _mixed_layout(program: Program, names: frozenset[str]) -> dict[str, Code]:
    """The code of every host that one of the adapters `names` changes, for batches of any of them."""
    if names not in program.layouts:
        sets = [key for key in program.layouts if isinstance(key, frozenset)]
        for key in sets if len(sets) >= _KEPT else ():
            del program.layouts[key]
        touched = {edit.site for name in names for edit in program.edits[name]}
        program.layouts[names] = {
            region.host: _mixed_code(program, region, names) for region in program.regions if region.host in touched
        }
    return program.layouts[names]


def _mixed_code(program: Program, region: Region, names: frozenset[str]) -> Code:
    """Fused, if all `names` that are at the host are of one family, else one that calls their own codes."""
    families = _families(program).get(region.host, {})
    here = {families[name] for name in names if name in families}
    family = here.pop() if len(here) == 1 else None
    cls = original_class(program.owners[region.host])
    if family is not None:
        edits = tuple(edit for edit in _edits_at(program, region.host) if families[edit.adapter] == family)
        key = (region.source, cls, tuple((edit.adapter, *edit.constants.items()) for edit in edits), family)
        if key not in program.codes:
            rule = find_rule(program.plan.adapters[edits[0].adapter], program.plan.sites[region.host])
            assert rule is not None, "the family has one"
            graph = _fused(region.source, rule, edits)
            program.codes[key] = Code(cls, graph, False, {}) if graph is not None else _split_code(program, cls)
        return program.codes[key]
    return _split_code(program, cls)


def _split_code(program: Program, cls: type[nn.Module]) -> Code:
    if cls not in program.codes:
        graph = fx.Graph()
        node = call(graph, OPAQUE, parameters_of(lambda *args, **kwargs: None))
        node.target = ops.by_row
        graph.output(node)
        program.codes[cls] = Code(cls, graph, True, {})
    return program.codes[cls]


def _codes(program: Program, hosts: Mapping[str, Code], rows: Sequence[str]) -> dict[int, dict[str, Code]]:
    """What runs on the rows of each adapter at the hosts that are not fused."""
    split = [host for host, code in hosts.items() if code.opaque]
    own = {name: layout(program, [name]) for name in set(rows) - {BASE}} if split else {}
    return {id(program.owners[h]): {name: codes[h] for name, codes in own.items() if h in codes} for h in split}


def _edits_at(program: Program, host: str) -> list[Edit]:
    return [edit for edits in program.edits.values() for edit in edits if edit.site == host]


def _families(program: Program) -> dict[str, dict[str, Any]]:
    """By host and adapter: what edits must have in common to be fused, or None for one that can't be."""
    if not program.families:
        for name, edits in program.edits.items():
            for edit in edits:
                program.families.setdefault(edit.site, {})[name] = _family(program, edit)
    return program.families


def _family(program: Program, edit: Edit) -> Any | None:
    site = program.plan.sites[edit.site]
    if edit.rule == MODULES_TO_SAVE or edit.slot != "output" or edit.opaque or site.kind != "linear":
        return None
    rule = find_rule(program.plan.adapters[edit.adapter], site)
    if rule is None or not rule.additive:
        return None
    if any(len(param.shape) != 2 for param in edit.params):
        return None
    flags = tuple((name, value) for name, value in edit.constants.items() if isinstance(value, bool | str))
    params = tuple((param.name, param.key, param.dtype) for param in edit.params)
    return edit.rule, flags, params, tuple(edit.dropouts.items())


class _Nothing:
    """The output before any adapter, in tracing: an additive rule adds its term to it."""

    def __add__(self, term: Any) -> Any:
        return term

    __radd__ = __add__


class _Factor(fx.Proxy):
    """A stacked parameter in tracing, which is good for one thing: a linear op, as a batched matrix product."""

    def __init__(self, stacked: fx.Proxy) -> None:
        self.stacked, self.tracer = stacked, stacked.tracer

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise TraceError("only F.linear(x, parameter) has a batched form")

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        if orig_method is not F.linear or len(args) != 2 or kwargs or isinstance(args[0], _Factor):
            raise TraceError(f"{orig_method} of a parameter has no batched form")
        x, factor = args
        return torch.bmm(x, factor.stacked.mT)


def _fused(source: Source, rule: Rule[Any], edits: Sequence[Edit]) -> fx.Graph | None:
    """A copy of the source's graph with the term of `rule` for all `edits`, on grouped rows; None if it can't be."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(source.graph, copies))
    node = next(new for old, new in copies.items() if old.name == source.anchors[0].node)
    form = form_of(node)
    assert form is not None, "a site that is not opaque has an op"
    tracer = GraphAppendingTracer(graph)
    users = list(node.users)
    with graph.inserting_before(node.next):
        x = fx.Proxy(operand(node, form.x), tracer)
        names = [edit.adapter for edit in edits]
        part = fx.Proxy(graph.call_function(ops.partition, (x.node, names)), tracer)
        try:
            y = _term(graph, tracer, part, x, rule, edits)
        except (TypeError, AttributeError, TraceError, NotImplementedError):
            return None
        own = fx.Proxy(node, tracer)
        y = fx.Proxy(graph.call_function(ops.add_groups, (part.node, node, y.node)), tracer).to(own.dtype)
    for user in users:
        user.replace_input_with(node, y.node)
    for unused in reversed(graph.nodes):
        if unused.target is ops.constants and not unused.users:
            graph.erase_node(unused)
    graph.lint()
    return graph


def _term(
    graph: fx.Graph, tracer: GraphAppendingTracer, part: fx.Proxy, x: fx.Proxy, rule: Rule[Any], edits: Sequence[Edit]
) -> fx.Proxy:
    """What `rule` adds to the output, for groups of rows (groups, tokens, features)."""

    def made(function: Any, *args: Any) -> fx.Proxy:
        return fx.Proxy(graph.call_function(function, args), tracer)

    first, values = edits[0], dict[str, Any]()
    for param in first.params:
        container, _, leaf = param.key.partition(".")
        values[param.name] = _Factor(made(ops.stack, part.node, graph.get_attr(container), leaf))
    dtype = values[first.params[0].name].stacked.dtype
    grouped = made(ops.group, part.node, x.node).to(dtype)
    for name, value in first.constants.items():
        numbers = {edit.adapter: edit.constants[name] for edit in edits}
        same = len(set(numbers.values())) == 1
        values[name] = value if same else made(ops.constants, part.node, numbers, grouped.node)
    for name, probability in first.dropouts.items():
        values[name] = partial(_dropped, made, graph, name) if probability else _same
    term = rule.output(cast(Tensor, grouped), cast(Tensor, _Nothing()), Bound(values))
    if not isinstance(term, fx.Proxy):
        raise TypeError("the rule returns no tensor")
    return term


def _dropped(made: Callable[..., fx.Proxy], graph: fx.Graph, name: str, x: fx.Proxy) -> fx.Proxy:
    return made(ops.drop, x.node, graph.get_attr(name))


def _same(x: fx.Proxy) -> fx.Proxy:
    return x
