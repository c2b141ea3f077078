"""The sites of a flat graph, by lineage: which nodes use each weight, and as which op."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from peftc.errors import CaptureError
from peftc.graph.finding import attribute_at
from peftc.graph.ops import Use, is_turn, operand, use_of, users_of
from peftc.graph.region import Anchor
from peftc.graph.sites import SiteIndex, WeightSite

_ASKED = ("shape", "dtype", "device", "ndim")


def anchors(
    graph: fx.Graph,
    model: nn.Module,
    sites: Mapping[str, WeightSite],
    called: Collection[str] = (),
    saved: Collection[str] = (),
) -> tuple[Anchor, ...]:
    """The anchors of `sites` in a flat graph of `model`, of modules that are `called` there as they are, and of those that
    are `saved` whole, of which only the tensors are read there; "" is the model's own call, which the graph is.

    A site has an anchor for every op that uses its weight; a single one without a node, if anything else does too: then
    only the weight can be replaced. Raises CaptureError if a site's weight is not used at all.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in called]
    found = [Anchor(str(node.target), node.name, f"{node.target}.weight", f"{node.target}.bias") for node in calls]
    missing = set(called) - {str(node.target) for node in calls}
    if missing:
        raise CaptureError(_never(min(missing), model))
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).append(node)
    for fqn, site in sites.items():
        if fqn not in called:
            found += _anchors_of(site, [r for r in readers.get(str(site.weight), ()) if r.users], model)
    for fqn in saved:
        if fqn and not any(name.startswith(f"{fqn}.") for name in readers):
            raise CaptureError(_never(fqn, model))
        found.append(Anchor(fqn, None))
    order = {node.name: number for number, node in enumerate(graph.nodes)}
    return tuple(sorted(found, key=lambda anchor: order.get(anchor.node or "", -1)))


def _anchors_of(site: WeightSite, readers: Sequence[fx.Node], model: nn.Module) -> list[Anchor]:
    weight, bias = str(site.weight), str(site.bias)
    if not readers:
        raise CaptureError(_never(site.fqn, model))
    uses: list[Use] = []
    for reader in readers:
        for user in (user for user in users_of(reader) if not _asks(user)):
            use = use_of(user, lambda node: _tensor(model, node).dim())
            if use is None or use.weight is not reader or (use.op.name, use.layout) != (site.op, site.layout):
                return [Anchor(site.fqn, None, weight, bias)]
            uses.append(use)
    return [Anchor(site.fqn, use.node.name, weight, bias) for use in uses]


def _asks(user: fx.Node) -> bool:
    """Whether a node asks something of a weight without any of its values."""
    return (user.target is getattr and user.args[1] in _ASKED) or user.target is torch.ops.aten.sym_size.int


def _never(fqn: str, model: nn.Module) -> str:
    return (
        f"{fqn}: {type(model).__name__} never uses it in the graph traced from it, so it can't be adapted. Leave it out"
        " (exclude_modules), or use capture='modules'."
    )


def _tensor(model: nn.Module, node: fx.Node) -> Tensor:
    return operator.attrgetter(str(node.target))(model)


def with_ops(index: SiteIndex, graph: fx.Graph, model: nn.Module) -> SiteIndex:
    """`index` with the parameters that `graph` uses in an op of the table, as sites of that op.

    So `F.linear(x, self.query)` is a linear site `query`, with all that such a site can have. One that lies the other way
    (`x @ self.query`) stays a parameter, whose rows are those of the stored tensor, as in files.
    """
    found: dict[str, WeightSite] = {}
    for node in list(graph.nodes):
        use = use_of(node, lambda weight: _tensor(model, weight).dim())
        known = index.inner.get(str(use.weight.target)) if use is not None else None
        if use is not None and known is not None and known.experts is None and use.layout == known.layout:
            found[known.fqn] = _as_site(known, use)
    return replace(index, inner={name: found.get(name, site) for name, site in index.inner.items()})


def _as_site(known: WeightSite, use: Use) -> WeightSite:
    place = use.form.bias
    bias = operand(use.node, place) if place is not None else None
    named = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    return replace(known, op=use.op.name, bias=named)


def split_ties(graph: fx.Graph, model: nn.Module) -> None:
    """Let every op read a shared tensor by the name that it has in the op's own module; a trace knows the first alone."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        own = names.get(id(attribute_at(model, str(node.target))), ())
        for user in list(_turned(node)) if len(own) > 1 else ():
            name = _nearest(user, own)
            if name is not None and name != node.target:
                _read_as(graph, node, user, name)


def _turned(reader: fx.Node) -> Iterator[fx.Node]:
    for user in reader.users:
        yield from user.users if is_turn(user) else (user,)


def _read_as(graph: fx.Graph, node: fx.Node, user: fx.Node, name: str) -> None:
    """Let `user` read what `node` reads by another name, turned if it was."""
    turn = next((arg for arg in user.all_input_nodes if arg is not node and is_turn(arg) and arg.args[0] is node), None)
    with graph.inserting_before(user):
        new = graph.get_attr(name)
        new.meta.update(node.meta)
        old = node
        if turn is not None:
            old, new = turn, graph.node_copy(turn, lambda _: new)
    user.replace_input_with(old, new)


def _nearest(user: fx.Node, names: Sequence[str]) -> str | None:
    """The one of `names` that belongs to the innermost module that `user` was traced in."""
    for module in reversed([*(user.meta.get("nn_module_stack") or {})]):
        prefix = str(module).partition("@")[0]
        for name in names:
            if name.rpartition(".")[0] == prefix:
                return name
    return None


def module_of(node: fx.Node) -> str:
    """The fqn of the module whose forward a node was traced from; torch.fx appends `@1` to it on a second call."""
    return next(reversed(node.meta.get("nn_module_stack") or {"": None}), "").partition("@")[0]
