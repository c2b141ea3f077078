"""The verifier: is a graph well-formed, and does it compute something of the same shape and dtype as before?"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftc.errors import RuleError
from peftc.graph.ops import is_op
from peftc.graph.region import HOST
from peftc.graph.sites import WeightSite, dtype_of

Signature = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Example:
    """An input that a site's op takes, on the meta device: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The input itself."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def example_for(site: WeightSite) -> Example | None:
    """An input for the module of `site`, or None where its op does not say what it takes."""
    if not site.has_plain_weight:
        return None
    dtype = dtype_of(site.dtype)
    if site.op == "linear":
        return Example((2, 3, site.in_features), dtype)
    if site.op == "embedding":
        return Example((2, 3), torch.int64)
    if site.kernel_size:
        # Larger than any kernel, whatever its dilation and padding leave of it is what the module says.
        return Example((2, site.in_features, *(64 for _ in site.kernel_size)), dtype)
    return None


def signature_of(graph: fx.Graph, root: Any, example: Example | None, bare: bool = False) -> Signature | None:
    """Shape and dtype of what the graph returns for the example; None if that can't be told. `bare`: its attributes are
    the host's own.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if example is None or len(inputs) != 1:
        return None
    try:
        result = _Shapes(graph, getattr(root, HOST) if bare else root).run(example.tensor())
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
        if bare:
            return None  # The module wants another input than this; its own code knows which.
        raise
    return (tuple(result.shape), result.dtype) if isinstance(result, Tensor) else None


def verify(graph: fx.Graph, root: Any, example: Example | None, expected: Signature | None, what: str) -> None:
    """Raise RuleError, naming `what` made the graph, if it is not well-formed or does not fit the `expected` signature."""
    try:
        graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise RuleError(f"{what}: the graph is not well-formed: {error}") from None
    if expected is None or example is None:
        return
    try:
        found = signature_of(graph, root, example)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RuleError(
            f"{what}: the graph does not run on an input of shape {list(example.shape)}: {error}"
        ) from error
    if found != expected:
        raise RuleError(f"{what}: the graph returns {_said(found)} where the module returns {_said(expected)}")


def _said(signature: Signature | None) -> str:
    return "no tensor" if signature is None else f"{signature[1]} of shape {list(signature[0])}"


class _Shapes(fx.Interpreter):
    """Runs a graph on the meta device: no value is read, and nothing that a module does to itself is done."""

    def __init__(self, graph: fx.Graph, root: Any) -> None:
        super().__init__(nn.Module(), garbage_collect_values=False, graph=graph)
        self.root = root

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = operator.attrgetter(target)(self.root)
        if isinstance(value, Tensor):
            return torch.empty_like(value, device="meta") if not value.is_meta else value.detach()
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if is_op(target):  # The meta device multiplies what no other device would.
            dtypes = {value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()}
            if len(dtypes) > 1:
                raise TypeError(f"{getattr(target, '__name__', target)} of {' and '.join(sorted(map(str, dtypes)))}")
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0]  # A dropout: what is spliced calls no other module.
