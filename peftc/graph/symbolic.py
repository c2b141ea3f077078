"""Symbolic capture: the whole model as one flat graph, hosted by the model itself."""

import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx, nn

from peftc.errors import CaptureError
from peftc.graph.lineage import anchors, module_of, split_ties
from peftc.graph.region import Region, Source, SourceCache, parameters_of
from peftc.graph.sites import WeightSite
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
    split_ties(graph, model)
    return Region("", Source(graph, anchors(graph, model, sites, leaves)))


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph of the whole `model` (a copy), torch.nn's modules as calls, to see what it does with its parameters."""
    return _traced(model, set(), set())


def flat_graph_of(model: nn.Module) -> fx.Graph:
    """The graph of the whole `model` (a copy), torch.nn's modules as the ops that they are."""
    graph = _traced(model, {fqn for fqn, _ in model.named_modules()}, set())
    split_ties(graph, model)
    return graph


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
    where = module_of(node)
    raise CaptureError(
        f"capture='symbolic': {_place(where, model.get_submodule(where))}, `{node.format_node()}` depends on"
        " self.training: tracing would freeze train() and eval() at one of them. Use a module (nn.Dropout) instead of"
        " the function, or capture='modules'."
    )
