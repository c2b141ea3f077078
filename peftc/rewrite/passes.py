"""Passes: frozen dataclasses that map a graph to a graph, in a named pipeline, verified before and after."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import fx

from peftc.errors import RuleError
from peftc.graph.region import Source
from peftc.rewrite.fusion import ProductsFused
from peftc.rewrite.program_passes import annotate
from peftc.rewrite.splice import Active, splice
from peftc.rewrite.verify import Example, signature_of, verify


@runtime_checkable
class Pass(Protocol):
    """What maps a graph to one that computes the same: a frozen dataclass, called with a graph that it may change.

    The graph is that of a host: its nodes read `host.…` (the module) and `a0.…` (the parts of the active adapters), and
    those that were inserted say so in `node.meta["peftc"]`. It returns the graph.

    Example::

        @dataclass(frozen=True)
        class Untouched:
            name = "untouched"

            def __call__(self, graph: fx.Graph) -> fx.Graph:
                return graph
    """

    @property
    def name(self) -> str:
        """What the pipeline calls it."""
        ...

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        """The graph after the pass."""
        ...


@dataclass(frozen=True)
class Ran:
    """What a pass did to a graph: how many nodes there were before and after."""

    name: str
    before: int
    after: int


def passes_of(given: Any) -> tuple[Pass, ...]:
    """What was given as passes, in their order. Raises RuleError if it is none of them."""
    listed = list(given) if isinstance(given, Iterable) else [given]
    wrong = [one for one in listed if isinstance(one, type) or not isinstance(one, Pass)]
    if wrong:
        raise RuleError(
            f"passes: {wrong[0]!r} is no pass; give a list of objects with a name that map a graph to one (peftc.Pass)"
        )
    return tuple(listed)


def rewritten(
    source: Source, active: Mapping[str, Sequence[Active]], passes: Sequence[Pass], root: Any, example: Example | None
) -> tuple[fx.Graph, tuple[Ran, ...]]:
    """The source's graph with the active edits spliced in, passes run over it and products fused; and what each did.

    `root` is what the graph's attributes are looked up on, `example` an input to check shapes and dtypes with; without one
    only the structure is checked. Raises RuleError, naming the pass, if a graph is not well-formed or computes something
    of another shape or dtype afterwards.
    """
    graph = splice(source, active)
    if passes:
        annotate(graph, root)
    expected = signature_of(source.graph, root, example, bare=not source.opaque)
    verify(graph, root, example, expected, "splice")
    graph, ran = piped(graph, [*passes, ProductsFused()], lambda new, name: verify(new, root, example, expected, name))
    return graph, (Ran("splice", len(source.graph.nodes), ran[0].before), *ran)


def piped(
    graph: fx.Graph, passes: Sequence[Pass], check: Callable[[fx.Graph, str], None]
) -> tuple[fx.Graph, tuple[Ran, ...]]:
    """The graph after all passes, each of which is checked, and what each did."""
    ran: list[Ran] = []
    for one in passes:
        count = len(graph.nodes)
        try:
            graph = one(graph)
        except Exception as error:  # A pass is anyone's code.
            raise RuleError(f"pass {one.name!r}: {type(error).__name__}: {error}") from error
        if not isinstance(graph, fx.Graph):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RuleError(f"pass {one.name!r} returns {type(graph).__name__}, no graph")
        check(graph, one.name)
        ran.append(Ran(one.name, count, len(graph.nodes)))
    return graph, tuple(ran)
