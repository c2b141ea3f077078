"""The last pass over every rewritten graph: an adapter's skinny products are computed by rows and added in place."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from peftc.graph.ops import operand
from peftc.rewrite.products import (
    add_pointwise,
    add_product,
    convolved,
    linear_with_products,
    product,
    weight_with_product,
)
from peftc.rewrite.splice import ORIGIN

aten = torch.ops.aten
_LINEAR = (F.linear, aten.linear.default)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
# Ops whose output nobody else has, nor needs for a gradient.
FRESH = (*_LINEAR, torch.addmm, torch.mm, aten.addmm.default, aten.mm.default)
# What adds a product: (y, inner, up, s, fresh).
_SUMS = (add_product, add_pointwise)


@dataclass(frozen=True)
class ProductsFused:
    """What rules say as y + linear(linear(dropout(x), A) · s, B), for any first product and any sum of such terms:

    - the first product casts A instead of x where that loses no range, and keeps no dropped copy of x;
    - the last is added to y in place, with s as its factor;
    - with the base's own linear op it is one op, which takes x by rows.

    So it is with convolutions, of which the last has one point; and what they say of weights as W + s · (B @ A) is one op.
    """

    name: str = "products-fused"

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        """The graph with all such terms fused; equal within rounding."""
        for node in list(graph.nodes):
            if ORIGIN in node.meta and node.target is operator.add and not node._erased:
                _accumulate(graph, node)
                _stand_in(graph, node)
        for node in list(graph.nodes):
            if node.target in _SUMS:
                _first_product(graph, node.args[1])
        for node in list(graph.nodes):
            if node.target in _LINEAR and ORIGIN not in node.meta:
                _with_products(graph, node)
        return graph


def _accumulate(graph: fx.Graph, node: fx.Node) -> None:
    """y + (a product, or a sum with some) as products added one by one, then what is left of the sum.

    A difference stays one: what its two products have in common has to cancel before it is added to anything.
    """
    y, term = node.args
    terms = list(_terms(term))
    products = [own for own in terms if _product(own) is not None]
    if not isinstance(y, fx.Node) or not products or (ORIGIN in y.meta and y.target not in _SUMS):
        return
    first, fresh, total = y, _is_fresh(y, node), y
    with graph.inserting_before(node):
        for own in products:
            add, *operands = _product(own) or (add_product,)
            total = graph.call_function(add, (total, *operands, fresh))
            total.meta, fresh = dict(node.meta), True
        rest = [own for own in terms if own not in products]
        for own in rest:
            total = graph.call_function(operator.add, (total, own))
            total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    _erase_unused(graph, term)
    for cast in [] if rest else list(total.users):
        if _is_cast_to_dtype_of(cast, _first(first)):
            wanted = cast.args[1]
            cast.replace_all_uses_with(total)
            graph.erase_node(cast)
            _erase_unused(graph, wanted)


def _terms(node: Any) -> Iterator[Any]:
    """The terms of the sum that `node` is."""
    if _is_own(node) and node.target is operator.add:
        yield from _terms(node.args[0])
        yield from _terms(node.args[1])
    else:
        yield node


def _product(term: Any) -> tuple[Any, Any, Any, Any] | None:
    """What adds it, and (inner, up, s), of linear(inner, up) · s and of linear(inner · s, up), s a number of an adapter's.

    Likewise of a convolution in one group without a bias, which the rules have for those of one point; or None.
    """
    scale, term = _scaled(term)
    if not _is_own(term):
        return None
    if term.target is F.linear and len(term.args) == 2 and not term.kwargs:
        add: Any = add_product
    elif term.target in _CONVOLUTIONS and term.args[2:] in ((), (None,)) and term.kwargs == {"groups": 1}:
        add = add_pointwise
    else:
        return None
    inner: Any = term.args[0]
    if scale == 1.0:
        scale, inner = _scaled(inner)
    if not isinstance(inner, fx.Node) or ORIGIN not in inner.meta or _is_cast_to_a_parameter(inner):
        return None  # A change as large as the weight, whose gradient is not to be rounded to half precision.
    return add, inner, term.args[1], scale


def _scaled(node: Any) -> tuple[Any, Any]:
    """(s, z) of z · s and s · z for a number s of an adapter's, else (1, the node itself)."""
    if _is_own(node) and node.target is operator.mul:
        for scale, other in (node.args, node.args[::-1]):
            if _is_number(scale):
                return scale, other
    return 1.0, node


def _stand_in(graph: fx.Graph, node: fx.Node) -> None:
    """W + s · (left @ right) as one op, with the casts of W to a wider dtype and of all that back to its own."""
    if node._erased:
        return
    weight, (scale, term) = node.args[0], _scaled(node.args[1])
    if not isinstance(weight, fx.Node) or not _is_own(term) or term.target not in (operator.matmul, torch.matmul):
        return
    dtype: Any = None
    if _is_own(weight) and weight.target == "to" and len(weight.args) == 2 and isinstance(weight.args[1], torch.dtype):
        weight, dtype = weight.args
    last = node
    if len(node.users) == 1 and _is_cast_to_dtype_of(user := next(iter(node.users)), weight):
        last = user
    with graph.inserting_before(last):
        new = graph.call_function(weight_with_product, (weight, *term.args, scale, dtype, last is not node))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    inputs = [*last.all_input_nodes, *node.all_input_nodes]
    for old in dict.fromkeys((last, node)):
        graph.erase_node(old)
    _erase_unused(graph, *(one for one in inputs if one is not node))


def _is_number(node: Any) -> bool:
    """Whether `node` reads a floating-point constant of a part (`a0.scaling`); tensors are further in it."""
    return (
        isinstance(node, fx.Node) and node.op == "get_attr" and ORIGIN in node.meta and str(node.target).count(".") == 1
    )


def _is_own(node: Any) -> bool:
    """Whether an adapter inserted `node` and one node reads it."""
    return isinstance(node, fx.Node) and ORIGIN in node.meta and len(node.users) == 1


def _is_fresh(y: fx.Node, reader: fx.Node) -> bool:
    """Whether nothing but `reader` reads the values of `y`, or has them."""
    others = [user for user in y.users if user is not reader and not _reads_dtype(user)]
    return not others and y.target in (*FRESH, *_CONVOLUTIONS, *_SUMS)


def _reads_dtype(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "dtype"


def _first(node: Any) -> Any:
    """What the products that end in `node` are added to."""
    while node.target in _SUMS:
        node = node.args[0]
    return node


def _is_cast_to_dtype_of(node: fx.Node, like: Any) -> bool:
    if node.op != "call_method" or node.target != "to" or len(node.args) != 2:
        return False
    wanted = node.args[1]
    return isinstance(wanted, fx.Node) and _reads_dtype(wanted) and wanted.args[0] is like


def _with_products(graph: fx.Graph, node: fx.Node) -> None:
    """The base's linear op and the products added to it, as one op."""
    x, weight, bias = (operand(node, place) for place in ((0, "input"), (1, "weight"), (2, "bias")))
    chain, terms = [node], list[tuple[Any, Any, Any]]()
    while (following := _only_sum(chain[-1])) is not None:
        inner: Any
        inner, up, scale = following.args[1:4]
        own = _is_own(inner) and inner.target is product and inner.args[0] is x
        terms.append((inner.args[1:] if own else inner, up, scale))
        chain.append(following)
    if not terms:
        return
    with graph.inserting_before(chain[-1]):
        new = graph.call_function(linear_with_products, (x, weight, bias, tuple(terms)))
    new.meta = dict(chain[-1].meta)
    for old in reversed(chain):
        old.replace_all_uses_with(new)
        inputs = old.all_input_nodes
        graph.erase_node(old)
        _erase_unused(graph, *(one for one in inputs if one not in chain))


def _only_sum(node: fx.Node) -> fx.Node | None:
    """The sum in place that is all that is made of `node`, if it is."""
    sums = [user for user in node.users if user.target is add_product and user.args[0] is node and user.args[4]]
    return sums[0] if sums else None


def _first_product(graph: fx.Graph, node: Any) -> None:
    """linear(dropout(x.to(A.dtype)), A), which one product reads, as one op; and a convolution likewise."""
    if not _is_own(node) or len(node.args) != 2:
        return
    is_linear = node.target is F.linear and not node.kwargs
    if not is_linear and node.target not in _CONVOLUTIONS:
        return
    x: Any
    x, down = node.args
    dropout: Any = None
    if _is_own(x) and x.op == "call_module" and len(x.args) == 1:
        dropout, x = x, x.args[0]
    cast: Any = x if _is_cast_to_a_parameter(x) else None
    with graph.inserting_before(node):
        module = graph.get_attr(str(dropout.target)) if dropout is not None else None
        operands = (x if cast is None else cast.args[0], down, module)
        if is_linear:
            new = graph.call_function(product, operands)
        else:
            new = graph.call_function(convolved, (*operands, node.kwargs))
    if module is not None:
        module.meta[ORIGIN] = node.meta[ORIGIN]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    _erase_unused(graph, *(one for one in (dropout, cast) if one is not None))


def _is_cast_to_a_parameter(node: Any) -> bool:
    """Whether the splicer cast `node` to the dtype of an adapter's parameter."""
    if not isinstance(node, fx.Node) or ORIGIN not in node.meta or node.target != "to" or len(node.args) != 2:
        return False
    wanted = node.args[1]
    return isinstance(wanted, fx.Node) and _reads_dtype(wanted) and ORIGIN in getattr(wanted.args[0], "meta", {})


def _erase_unused(graph: fx.Graph, *nodes: Any) -> None:
    """Take these off the graph if nothing reads them, and then what they alone read."""
    pending = [node for node in nodes if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop(0)
        if not node.users and not node._erased and ORIGIN in node.meta:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            pending += inputs
