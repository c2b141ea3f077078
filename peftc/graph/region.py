"""Regions: traced pieces of a model, each run by one host module, with the ops that sites anchor edits to.

Nothing here assumes that a site has a graph of its own: under `modules` capture every site hosts its own region, under
`symbolic` and `export` one region, hosted by the model, holds them all.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from peftc.graph.calling import Signature
from peftc.graph.hooked import NAMES, is_hooked, is_patched
from peftc.graph.ops import Use, use_of, users_of
from peftc.graph.packing import packed, unpacked
from peftc.graph.rows import is_plain
from peftc.graph.stand_in import STANDARD, has_changed, isolated, kept_by

Capture = Literal["modules", "symbolic", "export"]

# What generated code calls `self`: a binding, with the module that runs it, and that module as it was before.
HOST = "host"
OPAQUE = "base"


@dataclass(frozen=True)
class Anchor:
    """The op of a site in a region's graph: the site's fqn relative to the host, and the node's name.

    None for the node: no op of the table uses the weight, so it can only be replaced as a whole. `weight` is the path of
    the weight in the graph, `bias` of the bias.
    """

    site: str
    node: str | None
    weight: str = ""
    bias: str = ""


@dataclass(frozen=True, eq=False)
class Source:
    """A traced graph with its anchors; equal hosts share one. `opaque`: the host itself is a node of the graph.

    `signature`: how a whole program is called, whose placeholders are the tensors among its inputs. `training`: what runs
    in its place under train(), if that is another graph (not the same but for numbers and flags).
    """

    graph: fx.Graph
    anchors: tuple[Anchor, ...]
    opaque: bool = False
    signature: Signature | None = None
    training: "Source | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": packed(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpacked(state["graph"]))


@dataclass(frozen=True)
class Region:
    """A graph and the fqn of the module that runs it (`""`: the model)."""

    host: str
    source: Source


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a bound forward."""
    return list(inspect.signature(forward).parameters.values())


class SiteTracer(fx.Tracer):
    """Traces one module; its children, if any, stay calls, and what it does to its buffers stays in the graph."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass
class SourceCache:
    """Sources of modules that trace alike: 560 equal sites cost one trace."""

    sources: dict[Any, Source] = field(default_factory=dict)

    def get(self, module: nn.Module) -> Source:
        key = _alike(module)
        if key is None:
            return trace_site(module)
        if key not in self.sources:
            self.sources[key] = trace_site(module)
        return self.sources[key]


_SIZES = frozenset({"in_features", "out_features", "num_embeddings", "embedding_dim", "nf", "nx"})


def _alike(module: nn.Module) -> Any | None:
    """A key that two modules share only if their forwards trace to the same graph; None if that can't be told."""
    if module._modules or is_patched(module):
        return None
    state = {name: value for name, value in module.__dict__.items() if name not in STANDARD | NAMES}
    if type(module).__module__.startswith("torch.nn."):
        state = {name: value for name, value in state.items() if name not in _SIZES}
    parts: list[Any] = [type(module), tuple((name, value is None) for name, value in module._parameters.items())]
    parts.append(tuple(module._buffers))
    for name, value in state.items():
        plain = tuple(cast(list[Any], value)) if isinstance(value, list) else value
        if not isinstance(plain, int | float | str | tuple | None | torch.dtype | torch.device):
            return None
        parts.append((name, repr(plain)))
    return tuple(parts)


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module, inside of accelerate's hooks."""
    return MethodType(type(module).forward, module) if is_hooked(module) else module.forward


def trace_site(module: nn.Module) -> Source:
    """The graph of one site's own forward, or an opaque one if torch.fx can't trace it without changing its meaning.

    Opaque are: patched or multi-argument forwards, control flow on values, a forward that differs between train() and
    eval(), one that does anything with the weight but use it once in the site's op.
    """
    parameters = parameters_of(forward_of(module))
    simple = len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    weight = module._parameters.get("weight")
    # Of a weight that no arithmetic can be done with, a call of the module is all that can be adapted.
    plain = weight is not None and is_plain(weight)
    if plain and simple and not is_patched(module) and not isinstance(module, torch.jit.ScriptModule):
        graphs = [_trace_in_mode(module, training) for training in (True, False)]
        if graphs[0] is not None and graphs[1] is not None and str(graphs[0]) == str(graphs[1]):
            return Source(graphs[0], (Anchor("", _weight_op(graphs[0]), "weight", "bias"),))
    return opaque_source(parameters)


def _trace_in_mode(module: nn.Module, training: bool) -> fx.Graph | None:
    """Trace a shallow stand-in, so that the module's own flags and attributes are not touched."""
    stand_in: nn.Module = object.__new__(type(module))
    try:
        before = kept_by(module)
        held = {kind: dict(items) for kind, items in before.held.items()}
        state = {name: value for name, value in module.__dict__.items() if name not in NAMES}
        stand_in.__dict__.update(state, training=training, **held, **isolated(before.own, {}))
        graph = SiteTracer().trace(stand_in)
        if has_changed(stand_in, before):
            return None  # A traced graph would not do that.
    except Exception:  # A user's forward may raise anything at all on a proxy; such a module is opaque.
        return None
    for node in graph.nodes:
        # A tensor constant is stored on the stand-in; the module itself has no such attribute.
        if node.op == "get_attr" and str(node.target) not in {*module._parameters, *module._buffers}:
            return None
    return graph


def _weight_op(graph: fx.Graph) -> str | None:
    """The name of the one op that uses the parameter `weight`, if nothing else depends on the weight's values."""
    found: list[Use] = []
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "weight":
            for user in users_of(node):
                use = use_of(user)
                if use is not None and use.weight is node:
                    found.append(use)
                elif not (user.target is getattr and user.args[1] in ("dtype", "device", "shape")):
                    return None
    has_bias = any(node.op == "get_attr" and node.target == "bias" for node in graph.nodes)
    # The op itself has to add the bias; else its output is not the site's.
    return found[0].node.name if len(found) == 1 and (found[0].form.bias is not None or not has_bias) else None


def opaque_source(parameters: list[inspect.Parameter]) -> Source:
    """A graph that calls the host as it was, with the forward's parameters."""
    graph = fx.Graph()
    node = call(graph, OPAQUE, parameters)
    graph.output(node)
    return Source(graph, (Anchor("", node.name, "weight", "bias"),), opaque=True)


def weight_source(names: tuple[str, ...]) -> Source:
    """A graph that calls the host as it was, anchored for each of its weights (their names relative to the host)."""
    graph = fx.Graph()
    # A call of `invoke`, which the rewriter can turn into one with other weights.
    node = call(graph, OPAQUE, parameters_of(lambda *args, **kwargs: None))
    graph.output(node)
    return Source(graph, tuple(Anchor(name, node.name, name) for name in names), opaque=True)


def call(graph: fx.Graph, target: str, parameters: list[inspect.Parameter]) -> fx.Node:
    """Placeholders for `parameters`, and a node that calls module `target` with all of them.

    A `call_module` node; where the parameters include `*args` or `**kwargs`, which such a node can't spread, a call of
    `invoke` on the module.
    """
    if any(not _is_literal(parameter.default) for parameter in parameters):
        # Generated code can't spell such a default; let the module fill it in.
        parameters = parameters_of(lambda *args, **kwargs: None)
    args: list[fx.Node] = []
    kwargs: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    by_position = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            spread["more_args"] = graph.placeholder(f"*{parameter.name}")
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            spread["more_kwargs"] = graph.placeholder(f"**{parameter.name}")
        else:
            node = graph.placeholder(parameter.name, default_value=parameter.default)
            named = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and not by_position and len(args) > 0
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY or (named and parameter.default is not _EMPTY):
                kwargs[parameter.name] = node
            else:
                args.append(node)
    if not spread:
        return graph.call_module(target, tuple(args), kwargs)
    return graph.call_function(invoke, (graph.get_attr(target), tuple(args), kwargs), spread)


_EMPTY = inspect.Parameter.empty


def _is_literal(default: Any) -> bool:
    return default is _EMPTY or default is None or type(default) in (bool, int, float, str)


def invoke(
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """module(*args, *more_args, **kwargs, **more_kwargs), as one op."""
    return module(*args, *more_args, **kwargs, **(more_kwargs or {}))


def call_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The first argument of a module's call, whichever way it is passed."""
    args: Any = node.args[1] if node.target is invoke else node.args
    kwargs: Any = node.args[2] if node.target is invoke else node.kwargs
    if args or kwargs:
        return first_argument(args, kwargs)
    with graph.inserting_before(node):
        return graph.call_function(first_argument, (node.kwargs.get("more_args"), node.kwargs.get("more_kwargs")))


def replace_call_input(graph: fx.Graph, node: fx.Node, first: fx.Node, x: fx.Node) -> None:
    """Let a module's call have `x` in the place of `first`, what `call_input` gave for it."""
    if first.target is not first_argument:
        node.replace_input_with(first, x)
        return
    args, kwargs = first.args
    with graph.inserting_before(node):
        new = {
            "more_args": graph.call_function(positional_with, (args, x)),
            "more_kwargs": graph.call_function(named_with, (args, kwargs, x)),
        }
    node.kwargs = {**node.kwargs, **new}


def positional_with(args: tuple[Any, ...] | None, x: Any) -> tuple[Any, ...]:
    """The positional arguments of a call whose first argument is to be `x`."""
    return (x, *args[1:]) if args else ()


def named_with(args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None, x: Any) -> dict[str, Any]:
    """The named arguments of a call whose first argument is to be `x`."""
    named = dict(kwargs or {})
    return named if args else {**named, next(iter(named)): x}


def first_argument(args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> Any:
    """The first of a call's arguments."""
    return args[0] if args else next(iter((kwargs or {}).values()))
