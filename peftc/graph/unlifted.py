"""The graph of a program of torch.export, as a graph of the model: it reads the model's own tensors under their names, and
holds nothing that belongs to the trace (its device, its checks, its regions).
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from peftc.errors import CaptureError
from peftc.graph.assumed import sizes_of
from peftc.graph.calling import CacheLeaf
from peftc.graph.lineage import module_of

# What a node's meta says of the tensor it gives: its dtype and its sizes, names where they are open.
VALUE = "value"
_STACK = "nn_module_stack"


def unlifted(program: Any, model: nn.Module, caches: Sequence[CacheLeaf]) -> fx.Graph:
    """The graph of `program`, a trace of `model` that takes the tensors of `caches` last. Raises CaptureError."""
    return _Unlifted(program, model, caches).graph


@dataclass
class _Unlifted:
    """The graph of an exported program with the model's tensors read from it, and without what belongs to the trace."""

    program: Any
    given: nn.Module
    caches: Sequence[CacheLeaf]
    graph: fx.Graph = field(default_factory=fx.Graph)

    def __post_init__(self) -> None:
        signature = self.program.graph_signature
        self.cached = {leaf.name: (one.name, at) for one in self.caches for at, leaf in enumerate(one.leaves)}
        self.held: dict[str, fx.Node] = {}  # The placeholders of caches.
        self.lifted = {spec.arg.name: spec for spec in signature.input_specs if spec.target is not None}
        self.traced_on = _device(self.program)
        self.device: fx.Node | None = None
        result = self._copied(self.program.graph_module, None)
        self.graph.output(self._renewing(result) if self.caches else result)
        self.graph.eliminate_dead_code(changes_something)
        self.graph.lint()

    def _copied(self, module: fx.GraphModule, given: Sequence[Any] | None) -> Any:
        """Copy a graph; `given` are the values of an inner one's placeholders. Returns what its output is."""
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        if given is None:
            # The inputs first, as in any graph; the trace has the model's tensors before them.
            places.sort(key=lambda node: node.name in self.lifted)
        values = dict(zip(places, map(self._input, places) if given is None else given, strict=True))
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                values[node] = getattr(module, str(node.target))  # The graph of a region.
            elif str(node.target) in _CHECKS:
                continue  # True by the trace; the device and the sizes may be others now.
            else:
                values[node] = self._op(node, values)
        raise AssertionError("a graph has an output")

    def _renewing(self, result: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs, with the caches themselves for their names, and in them what comes out last."""
        from peftc.graph.caches import renewed  # Late, as transformers takes its time.

        made, left = list(result), len(result) - len(self.cached)
        outputs, tensors = made[:left], iter(made[left:])
        for one in self.caches:
            new = tuple(next(tensors) for _ in one.leaves)
            if one.name in outputs:
                cache = self.graph.call_function(renewed, (self.held[one.name], new))
                outputs = [cache if isinstance(value, str) and value == one.name else value for value in outputs]
        return tuple(outputs)

    def _cached_tensor(self, name: str, number: int) -> fx.Node:
        from peftc.graph.caches import tensor_of  # Late, as transformers takes its time.

        if name not in self.held:
            self.held[name] = self.graph.placeholder(name)
        return self.graph.call_function(tensor_of, (self.held[name], number))

    def _input(self, node: fx.Node) -> fx.Node:
        spec = self.lifted.get(node.name)
        if node.name in self.cached:
            new = self._cached_tensor(*self.cached[node.name])
        elif spec is None:
            new = self.graph.placeholder(node.name)
            if self.device is None and isinstance(node.meta.get("val"), Tensor):
                self.device = self.graph.call_function(getattr, (new, "device"))
        elif _has(self.given, spec.target):
            new = self.graph.get_attr(spec.target)
        else:
            new = self._constant(spec.target)
        return _described(new, node)

    def _constant(self, name: str) -> fx.Node:
        """A tensor that the forward makes of numbers, as its numbers."""
        value: Tensor = self.program.constants[name]
        if type(value) is not Tensor:
            raise CaptureError(
                f"capture='export': the forward makes {name} when it first runs; call the model once before it is captured"
            )
        if value.numel() > _MOST:
            raise CaptureError(
                f"capture='export': the forward makes a tensor of {value.numel():,} numbers; register it as a buffer, or"
                " use capture='modules'"
            )
        how = {"dtype": value.dtype, "device": self._where()}
        if not value.numel():
            return self.graph.call_function(torch.empty, (tuple(value.shape),), how)
        if value.is_meta:
            raise CaptureError("capture='export': the forward makes a tensor of numbers, which a model on meta has not")
        return self.graph.call_function(torch.tensor, (value.tolist(),), how)

    def _op(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        region = _REGIONS.get(str(node.target))
        if region is None and isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"capture='export': {node.target} in {module_of(node) or 'the model'} has graphs of its own, which one flat"
                " graph can't hold. Use capture='modules', which keeps the model's Python."
            )
        if region is not None:
            return region(self, [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args])
        if node.target is operator.getitem and isinstance(values.get(cast(Any, node.args[0])), tuple | list):
            return values[cast(Any, node.args[0])][node.args[1]]
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = pytree.tree_map(self._anywhere, (args, kwargs))
        return _described(self.graph.create_node(node.op, node.target, tuple(args), dict(kwargs), node.name), node)

    def _anywhere(self, value: Any) -> Any:
        """The device that the trace was on as the one that the inputs are on."""
        return self._where() if value == self.traced_on and isinstance(value, torch.device) else value

    def _where(self) -> Any:
        return self.device if self.device is not None else self.traced_on

    def graded(self, args: Sequence[Any]) -> Any:
        """A region without gradients (or with them again): what goes into it is detached."""
        enabled, module, *given = args
        return self._copied(module, given if enabled else [self._detached(value) for value in given])

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or not value.meta.get(VALUE, (torch.int64,))[0].is_floating_point:
            return value
        new = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        new.meta.update(value.meta)
        return new

    def cast(self, args: Sequence[Any]) -> Any:
        """A region with autocasting on or off."""
        *how, module = args[:5]
        # The device of the region, whatever the program runs on.
        entered = self.graph.call_function(_enter_autocast, (self._type(how[0]), *how[1:]))
        made = self._copied(module, args[5:])
        self.graph.call_function(_exit_autocast, (entered,))
        return made

    def _type(self, traced: str) -> Any:
        if traced != self.traced_on.type or self.device is None:
            return traced
        return self.graph.call_function(getattr, (self.device, "type"))


# The largest tensor that is spelled out in a graph.
_MOST = 4096
_CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten._assert_async.msg",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
_REGIONS = {"wrap_with_set_grad_enabled": _Unlifted.graded, "wrap_with_autocast": _Unlifted.cast}


def changes_something(node: fx.Node) -> bool:
    """Whether a node that nobody uses is there for what it does."""
    if node.target in (_enter_autocast, _exit_autocast) or node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _device(program: Any) -> torch.device:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def _described(new: fx.Node, node: fx.Node) -> fx.Node:
    """The new node with what is worth knowing of the traced one, and can be copied and pickled."""
    stack = cast("Mapping[str, tuple[str, Any]]", node.meta.get(_STACK) or {})
    new.meta[_STACK] = {fqn: cls if isinstance(cls, str) else cls.__name__ for fqn, cls in stack.values()}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        new.meta[VALUE] = (value.dtype, sizes_of(value))
    return new


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(operator.attrgetter(path)(model), Tensor)
    except AttributeError:
        return False
