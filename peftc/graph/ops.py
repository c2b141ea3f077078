"""The table of ops: which functions compute each, where their operands lie, and which modules are made of one.

It is open: a package adds rows under the entry point `peftc.ops`, a process with `register_op`.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from peftc.errors import RuleError

GROUP = "peftc.ops"
# (position, keyword) of an argument.
Place = tuple[int, str]
Layout = Literal["out_in", "in_out"]


@dataclass(frozen=True)
class Form:
    """Where one function keeps the operands of its op.

    `turned`: its weight lies (in, out) against the canonical (out, in). `dims`: it is this op if the weight has so many
    dimensions (aten has one convolution for all).

    Example: Form(x=(1, "mat1"), weight=(2, "mat2"), bias=(0, "input"), turned=True)  # of torch.addmm
    """

    x: Place = (0, "input")
    weight: Place = (1, "weight")
    bias: Place | None = (2, "bias")
    turned: bool = False
    dims: int | None = None


@dataclass(frozen=True)
class Shape:
    """What a module, or a weight in a graph, is as a site: the sizes of its canonical weight and how that is stored.

    `groups`: of a convolution. A module of another library may hold no plain weight; then it has only sizes.

    Example: Shape(module.in_features, module.out_features)  # of nn.Linear
    """

    in_features: int
    out_features: int
    layout: Layout = "out_in"
    kernel_size: tuple[int, ...] = ()
    groups: int = 1


def _no_shape(module: nn.Module) -> Shape | None:
    return None


@dataclass(frozen=True)
class Op:
    """One row: a kind of computation with a weight.

    `forms` maps functions and aten overloads to where their operands lie, `shape_of` says of a module that is one such
    op what its weight is. `apply` makes, from a node of the op, the same op as a function (x, weight) with the node's
    geometry, for canonical weights. `indices`: its input are indices, no numbers.
    `find(model, spec, rule, index, level, dtype_for, flat)`: for ops whose sites depend on the spec (a model's call), what
    finds them. `splice(graph, node, parts)`: for ops whose operands are not input, weight and output, what replaces them,
    `splice_inputs(graph, parts, signature)` what does so with the inputs of a whole program, where the op is the model's
    own call; and `methods(cls)` what makes a host's methods of its class's. `site`: the type of its sites. `unmixable`: why
    rows of a batch can't each have an adapter of their own there ({}: the site).

    Example: Op("linear", {F.linear: Form()}, apply=lambda node: F.linear)
    """

    name: str
    forms: Mapping[Any, Form] = field(default_factory=dict[Any, Form])
    shape_of: Callable[[nn.Module], Shape | None] = _no_shape
    apply: Callable[[fx.Node], Any] | None = None
    indices: bool = False
    find: Callable[..., Any] | None = None
    splice: Callable[..., None] | None = None
    splice_inputs: Callable[..., None] | None = None
    methods: Callable[[type[nn.Module]], Mapping[str, Any]] | None = None
    site: Any = None
    unmixable: str | None = None


@functools.cache
def ops() -> Mapping[str, Op]:
    """All rows by name, in the order in which modules are asked for their shape."""
    return {**_installed(), **_extra}


@functools.cache
def shapes() -> tuple[tuple[str, Callable[[nn.Module], Shape | None]], ...]:
    """What tells of a module that it is an op, by the op's name."""
    return tuple((name, op.shape_of) for name, op in ops().items() if op.shape_of is not _no_shape)


def _forget() -> None:
    for made in (ops, shapes, _by_target):
        made.cache_clear()


def op_named(name: str) -> Op:
    """The row `name`. Raises RuleError if there is none."""
    known = ops()
    if name not in known:
        raise RuleError(f"there is no op {name!r}; there are {', '.join(known)}")
    return known[name]


def register_op(op: Op) -> None:
    """Add a row to this process, as an entry point `peftc.ops` does for an installed package.

    Raises RuleError if it is none, or its name or one of its functions is taken.

    Example: register_op(Op("scale", {torch.mul: Form()}))
    """
    _require_op(op)
    taken = {target for other in ops().values() for target in other.forms if other.forms[target].dims is None}
    if op.name in ops() or taken & set(op.forms):
        raise RuleError(f"op {op.name!r}: its name or one of its functions is in the table already")
    _extra[op.name] = op
    _forget()


def unregister_op(op: Op) -> None:
    """Take a registered row back. Raises RuleError if it is not registered. Example: unregister_op(op)"""
    _require_op(op)
    if _extra.get(op.name) is not op:
        raise RuleError(f"op {op.name!r} is not registered")
    del _extra[op.name]
    _forget()


def _require_op(op: object) -> None:
    if not isinstance(op, Op):
        raise RuleError(f"{op!r} is not an Op: a row of the table, as Op('scale', {{torch.mul: Form()}})")


_extra: dict[str, Op] = {}


@functools.cache
def _installed() -> dict[str, Op]:
    found: dict[str, Op] = {}
    # peftc's own rows first: a module is the first op that says so.
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name != "peftc", point.name)):
        for op in cast("tuple[Op, ...]", point.load()):
            if op.name in found:
                raise RuleError(f"op {op.name!r} is in two packages")
            found[op.name] = op
    return found


@functools.cache
def _by_target() -> dict[Any, list[tuple[Op, Form]]]:
    table: dict[Any, list[tuple[Op, Form]]] = {}
    for op in ops().values():
        for target, form in op.forms.items():
            table.setdefault(target, []).append((op, form))
    return table


def is_op(target: Any) -> bool:
    """Whether a function is one of the table."""
    return target in _by_target()


def operand(node: fx.Node, place: Place) -> Any:
    """The argument of `node` at `place`, given by position or keyword."""
    position, name = place
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def replace_operand(node: fx.Node, place: Place, new: fx.Node) -> None:
    """Let `node` take `new` at `place`, by position if it has one there."""
    position, name = place
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(name, new)


@dataclass(frozen=True)
class Use:
    """A node as the op of a weight: the row, where its operands lie, the weight's node, and how that is stored."""

    node: fx.Node
    op: Op
    form: Form
    weight: fx.Node
    layout: Layout


def use_of(node: fx.Node, dims: Callable[[fx.Node], int] | None = None) -> Use | None:
    """What `node` is as the op of a weight, or None. `dims` gives the rank of a weight, for functions that need it."""
    for op, form in _by_target().get(node.target, ()) if node.op == "call_function" else _called(node):
        weight, turned = _source_of(operand(node, form.weight))
        if weight is None or (form.dims is not None and (dims is None or dims(weight) != form.dims)):
            continue
        return Use(node, op, form, weight, "in_out" if form.turned != turned else "out_in")
    return None


def _called(node: fx.Node) -> list[tuple[Op, Form]]:
    """Methods of tensors that are ops: `x.matmul(w)`."""
    return _by_target().get(torch.matmul, []) if node.op == "call_method" and node.target == "matmul" else []


def _source_of(value: Any) -> tuple[fx.Node | None, bool]:
    """The `get_attr` node that `value` is, or a turned view of; and whether it is turned."""
    turned = False
    while isinstance(value, fx.Node) and value.op != "get_attr":
        if not is_turn(value):
            return None, False
        turned, value = not turned, value.args[0]
    return (value, turned) if isinstance(value, fx.Node) else (None, False)


def is_turn(node: fx.Node) -> bool:
    """Whether `node` is `w.T`, `w.mT` or `w.t()`."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    return node.target in ("t", torch.t, torch.ops.aten.t.default) or (
        node.target in ("transpose", torch.transpose, torch.ops.aten.transpose.int)
        and set(node.args[1:]) in ({0, 1}, {-1, -2})
    )


def users_of(read: fx.Node) -> Iterator[fx.Node]:
    """The nodes that use what `read` gives, turned or not."""
    for user in read.users:
        yield from users_of(user) if is_turn(user) else (user,)


MATMULS = (operator.matmul, torch.matmul, torch.mm, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` is of another library's class, which says itself what arithmetic means."""
    cls = type(weight.data)
    return cls is not torch.Tensor and not cls.__module__.startswith("torch.")
