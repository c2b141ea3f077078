"""Symbolic capture: the whole model as one flat graph, hosted by the model itself."""

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from peftc.errors import CaptureError
from peftc.graph.ops import Use, operand, use_of
from peftc.graph.region import Anchor, Region, Source, SourceCache, parameters_of
from peftc.graph.sites import SiteIndex, WeightSite
from peftc.graph.stand_in import Kept, has_changed, kept_by


def trace_model(model: nn.Module, sites: Mapping[str, WeightSite], saved: Collection[str]) -> Region:
    """Trace `model` in which the modules of `sites` are inlined and those of `saved`, and torch.nn's, stay calls.

    The model is traced in train and in eval mode, on the structure given (a copy); forward parameters whose default is
    None are fixed at None. Raises CaptureError if it does not trace, or traces differently in the two modes.
    """
    cache = SourceCache()
    modules = [fqn for fqn, site in sites.items() if site.host is None]
    called = {fqn for fqn in modules if cache.get(model.get_submodule(fqn)).opaque}
    leaves = called | set(saved)
    graph = _traced(model, set(modules) - leaves, leaves)
    anchors = tuple(_anchors(graph, model, sites, leaves))
    missing = (set(sites) | set(saved)) - {anchor.site for anchor in anchors}
    if missing:
        fqn = min(missing)
        raise CaptureError(
            f"capture='symbolic': {type(model).__name__} never calls {fqn!r} in the graph traced from it, so it can't be"
            " adapted. Leave it out (exclude_modules), or use capture='modules'."
        )
    return Region("", Source(graph, anchors))


def with_ops(model: nn.Module, index: SiteIndex) -> SiteIndex:
    """`index` with the parameters that the traced `model` uses in an op of the table, as sites of that op.

    So `F.linear(x, self.query)` is a linear site `query`, with all that such a site can have.
    """
    graph = _traced(model, set(), set())
    found: dict[str, WeightSite] = {}
    for use in _uses(graph, model):
        name = str(use.weight.target)
        known = index.inner.get(name)
        if known is not None and known.experts is None and known.known_as is None:
            found[name] = _as_site(known, use, model)
    return replace(index, inner={name: found.get(name, site) for name, site in index.inner.items()})


def _as_site(known: WeightSite, use: Use, model: nn.Module) -> WeightSite:
    rows, columns = model.get_parameter(known.fqn).shape[:2]
    if use.layout == "in_out":
        rows, columns = columns, rows
    place = use.form.bias
    bias = operand(use.node, place) if place is not None else None
    named = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    return replace(known, op=use.op.name, in_features=columns, out_features=rows, layout=use.layout, bias=named)


def _uses(graph: fx.Graph, model: nn.Module) -> Iterator[Use]:
    def dims(weight: fx.Node) -> int:
        return model.get_parameter(str(weight.target)).dim()

    for node in list(graph.nodes):
        use = use_of(node, dims)
        if use is not None:
            yield use


def _traced(model: nn.Module, inlined: Collection[str], leaves: Collection[str]) -> fx.Graph:
    before = {fqn: kept for fqn, module in model.named_modules() if (kept := _kept(module)) is not None}
    graphs = [_trace(model.train(training), inlined, leaves) for training in (True, False)]
    for fqn, kept in before.items():
        module = model.get_submodule(fqn)
        if has_changed(module, kept):
            raise CaptureError(
                f"capture='symbolic': {_place(fqn, module)}, the forward assigns to its module, which a graph would not."
                " Use capture='modules', which keeps the model's Python."
            )
    _require_equal(model, *graphs)
    return graphs[0]


def _kept(module: nn.Module) -> Kept | None:
    try:
        return kept_by(module)
    except TypeError:  # What it keeps can't be compared.
        return None


class _ModelTracer(fx.Tracer):
    """Inlines everything but torch.nn's modules and the given leaves; remembers where it is for error messages."""

    def __init__(self, inlined: Collection[str], leaves: Collection[str]) -> None:
        super().__init__()
        self.inlined, self.leaves = inlined, leaves
        self.where = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.inlined:
            return False
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, self.where = self.where, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.where = before  # Not in a finally: on an error it stays at the innermost module.
        return result


def _trace(model: nn.Module, inlined: Collection[str], leaves: Collection[str]) -> fx.Graph:
    tracer = _ModelTracer(inlined, leaves)
    fixed = {p.name: None for p in parameters_of(model.forward) if p.default is None}
    try:
        graph = tracer.trace(model, concrete_args=fixed or None)
    except Exception as error:  # The model's own code may raise anything on a proxy.
        module = model.get_submodule(tracer.where)
        raise CaptureError(
            f"capture='symbolic': {type(model).__name__} does not trace: {_place(tracer.where, module)},"
            f" {_construct(error)}: {error}. Use capture='modules', which keeps the model's Python."
        ) from error
    # torch.fx numbers the placeholders of fixed arguments; callers pass them by their own names.
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(inputs, parameters_of(model.forward), strict=True):
        if parameter.default is None:
            node.target = parameter.name
    return graph


def _place(fqn: str, module: nn.Module) -> str:
    return f"in {fqn or 'the model'} ({type(module).__name__})"


def _construct(error: BaseException) -> str:
    """The line of the model's own code where tracing failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename and "/peftc/" not in frame.filename]
    return f"at {own[-1].filename}:{own[-1].lineno} `{own[-1].line}`" if own else type(error).__name__


def _require_equal(model: nn.Module, train: fx.Graph, evaluate: fx.Graph) -> None:
    """Refuse a graph that would freeze train() or eval(), naming the first op that differs."""
    if str(train) == str(evaluate):
        return
    pairs = zip([*train.nodes], [*evaluate.nodes], strict=False)
    node = next((a for a, b in pairs if a.format_node() != b.format_node()), next(iter(train.nodes)))
    where = _module_of(node)
    raise CaptureError(
        f"capture='symbolic': {_place(where, model.get_submodule(where))}, `{node.format_node()}` depends on"
        " self.training: tracing would freeze train() and eval() at one of them. Use a module (nn.Dropout) instead of"
        " the function, or capture='modules'."
    )


def _anchors(
    graph: fx.Graph, model: nn.Module, sites: Mapping[str, WeightSite], leaves: Collection[str]
) -> list[Anchor]:
    found: list[Anchor] = []
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in leaves:
            found.append(Anchor(str(node.target), node.name, f"{node.target}.weight", f"{node.target}.bias"))
            continue
        use = use_of(node, lambda weight: model.get_parameter(str(weight.target)).dim())
        site = _site_of(use, model, sites) if use is not None else None
        if use is None or site is None:
            continue
        own = str(site.weight)
        if use.weight.target != own:
            # A tied weight is traced under its first name; at this site it goes by the site's own.
            user = next(user for user in (node, *node.all_input_nodes) if use.weight in user.all_input_nodes)
            with graph.inserting_before(user):
                user.replace_input_with(use.weight, graph.get_attr(own))
        found.append(Anchor(site.fqn, node.name, own, str(site.bias)))
    return found


def _site_of(use: Use, model: nn.Module, sites: Mapping[str, WeightSite]) -> WeightSite | None:
    """The site whose op this is: that of the module it was traced from, or a weight's own."""
    weight = model.get_parameter(str(use.weight.target))
    names = (_module_of(use.node), str(use.weight.target))
    site = next((sites[name] for name in names if name in sites), None)
    return site if site is not None and model.get_parameter(str(site.weight)) is weight else None


def _module_of(node: fx.Node) -> str:
    """The fqn of the module whose forward a node was traced from; torch.fx appends `@1` to it on a second call."""
    return next(reversed(node.meta.get("nn_module_stack", {"": None})), "").partition("@")[0]
