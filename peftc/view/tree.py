"""The model as a tree of modules with what plans do at each: equal layers are one branch, amounts are summed up."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Self

from torch import nn

from peftc.edits import Edit, Planned, TrainedTensor
from peftc.errors import PlanError
from peftc.graph.hooked import given_class
from peftc.graph.sites import dtype_of
from peftc.view.groups import alike, is_number, layer_of, ranges


class Amounts(NamedTuple):
    """What adapters add: parameters that train, bytes of their tensors, FLOPs of a token."""

    trained: int = 0
    bytes: int = 0
    flops: int = 0

    def times(self, count: int) -> Self:
        """`count` times as much."""
        return type(self)(*(count * own for own in self))


def total(amounts: Iterable[Amounts]) -> Amounts:
    """Their sum."""
    return Amounts(*map(sum, zip(*amounts, strict=True))) if (amounts := [*amounts]) else Amounts()


@dataclass(frozen=True)
class Here:
    """What one plan does at one module itself, and what that and all inside of it amounts to."""

    edits: tuple[Edit, ...]
    trained: tuple[TrainedTensor, ...]
    amounts: Amounts


@dataclass(frozen=True)
class Branch:
    """A module, or `count` equal ones, whose names are in `path` (`model.layers.{0–79}`); a part of it is `name`.

    `module` is its class and `own` the number of parameters in it, if the model was given. `here`: by plan, in order.
    """

    name: str
    path: str
    count: int
    module: str | None
    own: int | None
    here: tuple[Here, ...]
    children: tuple["Branch", ...]

    @property
    def adapted(self) -> bool:
        """Whether a plan does something in it."""
        return any(here.edits or here.trained for here in self.here) or any(child.adapted for child in self.children)

    @property
    def differs(self) -> bool:
        """Whether plans do not do the same in it."""
        return len({_done(here) for here in self.here}) > 1 or any(child.differs for child in self.children)


def what(edit: Edit) -> Hashable:
    """What an edit does, but for the name of its adapter, which two plans may choose as they like."""
    return edit.rule, edit.slots, edit.params, edit.opaque, *edit.constants.items(), *edit.dropouts.items()


def _done(here: Here) -> Hashable:
    """What is done at a module."""
    return (*map(what, here.edits), *((tensor.shape, tensor.dtype) for tensor in here.trained))


@dataclass
class _Module:
    """A module while the tree is made: its parts by name, and for every plan what is done at it."""

    edits: list[list[Edit]]
    trained: list[list[TrainedTensor]]
    module: str | None = None
    own: int = 0
    parts: dict[str, "_Module"] = field(default_factory=dict[str, "_Module"])


def tree(plans: Sequence[Planned], model: nn.Module | None = None) -> Branch:
    """The tree of `plans` of one model; with the `model`, also of what they leave alone.

    What all sites of an adapter share counts at the root. Raises PlanError if they are of another model.
    """
    root = _new(len(plans))
    if model is not None:
        _add_modules(root, model, plans)
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            _at(root, edit.site).edits[number].append(edit)
        for tensor in plan.trained:
            _at(root, tensor.name.rpartition(".")[0]).trained[number].append(tensor)
    made, _ = _branch(root, "", "", plans, model is not None)
    shared = [total(_shared(plan)) for plan in plans]
    here = (
        Here(own.edits, own.trained, total((own.amounts, more))) for own, more in zip(made.here, shared, strict=True)
    )
    return Branch("", "", 1, made.module, made.own, tuple(here), made.children)


def _new(plans: int) -> _Module:
    return _Module([[] for _ in range(plans)], [[] for _ in range(plans)])


def _at(root: _Module, fqn: str) -> _Module:
    """The module `fqn`, made if it is not there."""
    for part in fqn.split(".") if fqn else ():
        if part not in root.parts:
            root.parts[part] = _new(len(root.edits))
        root = root.parts[part]
    return root


def _add_modules(root: _Module, model: nn.Module, plans: Sequence[Planned]) -> None:
    seen: set[int] = set()
    for fqn, module in model.named_modules():
        place = _at(root, fqn)
        place.module = given_class(type(module)).__name__
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, own))
        place.own = sum(parameter.numel() for parameter in own)
    for plan in plans:
        for site in plan.sites.values():
            if _at(root, site.owner).module is None:
                raise PlanError(
                    f"{site.fqn}: the plan is of another model: this {type(model).__name__} has no such module"
                )


def _branch(module: _Module, name: str, path: str, plans: Sequence[Planned], known: bool) -> tuple[Branch, object]:
    """The branch of a module, and what it has in common with its equals."""
    parts: list[tuple[str, Branch, object]] = []
    for part, inner in module.parts.items():
        inside, key = _branch(inner, part, f"{path}.{part}" if path else part, plans, known)
        parts.append((part, inside, key))
    children = tuple(_grouped(parts))
    here = tuple(
        Here(tuple(edits), tuple(trained), total([
            *map(of_edit, edits), *map(_of_tensor, trained), *(child.here[at].amounts for child in children)
        ]))
        for at, (edits, trained) in enumerate(zip(module.edits, module.trained, strict=True))
    )  # fmt: skip
    own = module.own + sum(child.own or 0 for child in children) if known else None
    key = (
        module.module, module.own,
        tuple(tuple(alike(plan, edit) for edit in edits) for plan, edits in zip(plans, module.edits, strict=True)),
        tuple(tuple((tensor.shape, tensor.adapter) for tensor in trained) for trained in module.trained),
        tuple((part, inner) for part, _, inner in parts),
    )  # fmt: skip
    made = Branch(name, path, 1, module.module, own, here, children)
    return _joined(made), key


def _joined(branch: Branch) -> Branch:
    """A module with nothing but one part, with that as one: `model.layers`."""
    (only,) = branch.children if len(branch.children) == 1 else (None,)
    idle = branch.module is None and not any(here.edits or here.trained for here in branch.here)
    if only is None or not idle or not branch.name or only.count > 1 or any(map(is_number, (branch.name, only.name))):
        return branch
    return Branch(f"{branch.name}.{only.name}", only.path, 1, None, only.own, only.here, only.children)


def _grouped(parts: Sequence[tuple[str, Branch, object]]) -> Iterator[Branch]:
    """Parts that are numbered and equal as one, where the first of them was."""
    groups: dict[object, list[Branch]] = {}
    for name, branch, key in parts:
        groups.setdefault(key if is_number(name) else name, []).append(branch)
    for alike_ones in groups.values():
        yield alike_ones[0] if len(alike_ones) == 1 else _as_one(alike_ones)


def _as_one(branches: Sequence[Branch]) -> Branch:
    first, count = branches[0], len(branches)
    name = "{" + ranges(int(branch.name) for branch in branches) + "}"
    at = len(first.path) - len(first.name)
    return _repeated(first, count, name, first.path[:at], len(first.path))


def _repeated(branch: Branch, count: int, name: str, before: str, cut: int) -> Branch:
    """A branch for `count` equal ones: `before` and `name` in the place of the first `cut` characters of its path."""
    path = f"{before}{name}{branch.path[cut:]}"
    here = tuple(Here(own.edits, own.trained, own.amounts.times(count)) for own in branch.here)
    children = tuple(_repeated(child, count, name, before, cut) for child in branch.children)
    own = None if branch.own is None else branch.own * count
    named = name if len(branch.path) == cut else branch.name
    return Branch(named, path, branch.count * count, branch.module, own, here, children)


def of_edit(edit: Edit) -> Amounts:
    """What an edit adds at its own site: not what it shares with others, and not what is another's."""
    params = [param for param in edit.params if not param.shared] if edit.follows is None else []
    return Amounts(
        sum(param.numel for param in params if param.trainable),
        sum(param.numel * dtype_of(param.dtype).itemsize for param in params),
        edit.flops_per_token,
    )


def _of_tensor(tensor: TrainedTensor) -> Amounts:
    """What a bias of the base adds that trains: it is there already."""
    return Amounts(prod(tensor.shape))


def _shared(plan: Planned) -> list[Amounts]:
    """What adapters add once for all their sites."""
    pairs = [(edit, param) for edit in plan.edits if edit.follows is None for param in edit.params if param.shared]
    once = {(edit.adapter, param.key): param for edit, param in pairs}
    return [
        Amounts(param.numel if param.trainable else 0, param.numel * dtype_of(param.dtype).itemsize)
        for param in once.values()
    ]


def layers(plan: Planned) -> Mapping[str, Mapping[int, Amounts]]:
    """What each numbered layer adds, by the path before the first number in its name: `model.layers`."""
    found: dict[str, dict[int, list[Amounts]]] = {}
    pairs: list[tuple[str, Any]] = [(edit.site, of_edit(edit)) for edit in plan.edits]
    pairs += [(tensor.name, _of_tensor(tensor)) for tensor in plan.trained]
    for fqn, amounts in pairs:
        path, number, _ = layer_of(fqn)
        if number is not None:
            found.setdefault(path, {}).setdefault(number, []).append(amounts)
    return {path: {at: total(own) for at, own in sorted(by.items())} for path, by in found.items()}
