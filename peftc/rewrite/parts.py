"""An adapter's live tensors: on the modules of its sites, under PEFT's names, and as generated code reads them."""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.hooked import device_of
from peftc.graph.sites import Site, WeightSite, dtype_of
from peftc.plan import MODULES_TO_SAVE, Edit, PlannedParam
from peftc.rewrite.holders import VALUE, Container, Holder, Vectors, code_path
from peftc.rewrite.sharding import Layout, Places, is_sharded, managed, whole
from peftc.rewrite.views import pristine_copy
from peftc.rule import Argument, Bound, Rule
from peftc.specs import AdapterSpec


@dataclass(eq=False, repr=False)
class Part:
    """What one edit has at its site. `owners`: by checkpoint key, the module and the name that a tensor has in it.

    Its other attributes are what generated code reads: modules that own tensors (never the tensors, which others may
    exchange), dropouts, and the edit's numbers.
    """

    edit: Edit
    site: Site
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict[str, tuple[nn.Module, str]])

    def __post_init__(self) -> None:
        self.form = form_of(self.edit, self.site)
        self.become(self.edit)

    def become(self, edit: Edit) -> None:
        """Go by `edit`, which differs in floating-point constants alone."""
        self.edit = edit
        # As tensors without dimensions, which torch.compile does not look into; else it would compile anew for each value.
        for name, value in edit.constants.items():
            if type(value) is float:
                self.__dict__[name] = _number(value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "form"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, form=form_of(state["edit"], state["site"]))

    def __repr__(self) -> str:
        return f"<{self.edit.adapter}: {self.edit.rule.name} at {self.edit.site or 'the model'}>"

    def tensor(self, key: str) -> Tensor:
        """The live tensor with checkpoint key `key`: a parameter, or a buffer of a module saved whole."""
        module, leaf = self.owners[key]
        return tensor_slots(module, leaf)[leaf]

    def on_replica(self, host: nn.Module) -> "Part":
        """The same part on `host`, a copy of its owner that nn.DataParallel made: the tensors there are attributes."""
        new: Part = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        holder = host if self.site.added is None else getattr(host, self.site.added)
        names = [param.key.partition(".")[0] for param in self.edit.params]
        names += [name for name, probability in self.edit.dropouts.items() if probability > 0]
        for first in names if self.edit.rule.container is None else ():
            container = getattr(holder, first, None)
            if container is None:
                raise AdapterError(
                    f"{self.edit.site}: what all sites share can't be replicated by nn.DataParallel; use DDP"
                )
            own = getattr(container, self.edit.adapter)
            new.__dict__[first] = own if isinstance(own, nn.Module) else SimpleNamespace(**{VALUE: own})
        if self.edit.rule.container is not None and containers(self.edit):
            new.__dict__["own"] = getattr(getattr(holder, self.edit.rule.container), self.edit.adapter)
        return new

    def live(self, key: str) -> Tensor:
        """As `tensor`, by the way that generated code takes: on replicas too."""
        path = key if self.edit.rule.container is None else f"own.{key}"
        return operator.attrgetter(code_path(path))(self)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their names in the rule."""
        return {param.name: self.tensor(param.key) for param in self.edit.params}

    def bound(self, **more: Any) -> Bound:
        """What the rule gets as `p` outside of a graph: live tensors and numbers, and `more`, which goes before them."""
        return Bound({**self.tensors(), **self.edit.constants, **more})

    @property
    def changes_bias(self) -> bool:
        """Whether the rule makes another bias of one that its site has, or would have."""
        if not isinstance(self.site, WeightSite) or not self.edit.rule.offers("bias"):
            return False
        bias = torch.zeros(self.site.out_features, device=next(iter(self.tensors().values())).device)
        with torch.no_grad():
            return self.edit.rule.bias(bias, self.bound(bias=bias)) is not bias

    @property
    def module(self) -> nn.Module:
        """The adapter's module, of a rule whose adapters are modules; of several sites of one, the first alone has it."""
        return self.__dict__["own"]


@dataclass
class Adapter:
    """An adapter and its parts, by site and name of the rule. `extras`: what its files hold beside the tensors; `scale`:
    how much of its change is applied; `states`: what its rules keep from step to step, by name; `by_hand`: who trains says
    when a step is over; `arguments`: which of the call's arguments they take, each with the number that it is below, if
    there is one.
    """

    name: str
    spec: AdapterSpec
    parts: dict[tuple[str, str], Part] = field(default_factory=dict[tuple[str, str], Part])
    extras: dict[str, Any] = field(default_factory=dict[str, Any])
    scale: float = 1.0
    states: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    by_hand: bool = False
    arguments: dict[str, tuple[Argument, int | None]] = field(default_factory=dict[str, tuple[Argument, int | None]])

    @functools.cached_property
    def trained(self) -> list[tuple[dict[str, Any], str]]:
        """Where its trainable tensors are, looked up once: the dict that holds each, and its name there."""
        return [
            (module._parameters, leaf)
            for part in self.parts.values()
            for module, leaf in (part.owners[param.key] for param in part.edit.params if param.trainable)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trained"}

    @property
    def edits(self) -> list[Edit]:
        """Its edits, in the plan's order."""
        return [part.edit for part in self.parts.values()]

    def part(self, edit: Edit) -> Part:
        """The part of one of its edits."""
        return self.parts[edit.site, edit.rule.name]

    def tensor(self, edit: Edit, key: str) -> Tensor:
        """The live tensor of `edit` with checkpoint key `key`."""
        return self.part(edit).tensor(key)


def asks(rule: Rule[Any]) -> bool:
    """Whether a rule asks about the model's call: where it begins to act in the text, or for some arguments."""
    return bool(rule.arguments) or begins(rule)


def begins(rule: Rule[Any]) -> bool:
    """Whether a rule acts from some place in the text on."""
    return rule.offers("begins")


def form_of(edit: Edit, site: Site) -> Any:
    """What the spliced code depends on of an edit: all but its adapter, its sizes and its floating-point numbers."""
    dropouts = tuple((name, probability > 0) for name, probability in edit.dropouts.items())
    params = tuple((param.name, param.key, param.dtype) for param in edit.params)
    constants = tuple((name, None if type(value) is float else value) for name, value in edit.constants.items())
    layout = site.layout if isinstance(site, WeightSite) else ""
    bias = site.bias is not None if isinstance(site, WeightSite) else False
    key = (edit.rule, edit.slots, params, constants, dropouts, site.op, layout, bias, edit.unmergeable is None)
    return _FORMS.setdefault(key, len(_FORMS))


# Forms as numbers, which are compared a hundred times as fast.
_FORMS: dict[Any, int] = {}


def tensor_slots(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dict of `module` that holds its own tensor `leaf`: `_parameters` or `_buffers`."""
    return module._parameters if leaf in module._parameters else module._buffers


@functools.lru_cache(maxsize=4096)
def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def containers(edit: Edit) -> list[str]:
    """The names of the children that an edit adds to the holder of its site."""
    if edit.rule.container is not None:
        return [edit.rule.container] if edit.whole or edit.params else []
    used = [name for name, probability in edit.dropouts.items() if probability > 0]
    own = [param.key.partition(".")[0] for param in edit.params if not param.shared]
    return list(dict.fromkeys([*own, *used]))


def attach(
    edit: Edit,
    site: Site,
    holder: nn.Module,
    root: nn.Module,
    spec: AdapterSpec,
    weight: nn.Parameter | None,
    places: Places,
) -> Part:
    """Create what `edit` adds to `holder`, the module that holds adapters at `site`; not initialised yet.

    `root` is the model, for tensors that all sites share; `weight` the site's, for the device and the layout.
    """
    part = Part(edit, site)
    if edit.rule.container is not None:
        if containers(edit):
            _attach_module(part, holder, _copy_of(holder, places) if edit.whole else _encoder(part, holder, spec))
        return part
    device = device_of(holder, weight) if weight is not None else torch.device(site.device)
    layout = places.layout(site, weight)
    for param in edit.params:
        _attach_tensor(part, param, root if param.shared else holder, device, layout)
    for name, probability in edit.dropouts.items():
        if probability > 0:
            dropouts = _child(holder, name, Container)
            dropouts[edit.adapter] = part.__dict__[name] = nn.Dropout(probability).train(holder.training)
    return part


def _attach_tensor(
    part: Part, param: PlannedParam, holder: nn.Module, device: torch.device, layout: Layout | None
) -> None:
    adapter = part.edit.adapter
    first, dot, rest = param.key.partition(".")
    if param.is_table:
        tables = _child(holder, first, Container)
        module, rest = tables._modules.get(adapter), VALUE
        if module is None:
            module = tables._modules[adapter] = _blank(Holder)
            module.register_buffer(VALUE, _allocated(part, param, device, layout))
        part.owners[param.key], part.__dict__[first] = (module, VALUE), module
        return
    if dot:
        holders = _child(holder, first, Container)
        # The names were checked before, so there is no need to look for them again in every module.
        top = holders._modules.get(adapter)
        if top is None:
            top = holders._modules[adapter] = _blank(Holder)
            top._parameters["bias"] = None  # As a linear without one has it.
        module, (*inner, rest) = top, rest.split(".")
        for name in inner:
            module = _child(module, name, Holder)
        part.owners[param.key] = (module, rest)
    else:
        vectors = _child(holder, first, Vectors)
        top = module = vectors
        rest = adapter
        part.owners[param.key] = (vectors, adapter)
    if module._parameters.get(rest) is None:
        parameter = nn.Parameter(_allocated(part, param, device, layout), requires_grad=False)
        if dot:
            module._parameters[rest] = parameter
        else:
            cast(Vectors, module)[rest] = parameter
    part.__dict__[first] = top if dot else cast(Vectors, module).leaf(adapter)


def _child(module: nn.Module, name: str, cls: type[Any]) -> Any:
    child = module._modules.get(name)
    if child is None:
        child = module._modules[name] = cls() if cls is Vectors else _blank(cls)
    elif not isinstance(child, cls):
        raise AdapterError(
            f"{name} holds tensors of another method here, whose files have other keys; compile another copy of the model"
        )
    return child


def _blank(cls: type[Any]) -> Any:
    """`cls()` in half the time, for classes that begin with empty containers: there are four for each site."""
    new = object.__new__(cls)
    plain, containers = _beginning(cls)
    new.__dict__.update(plain)
    for name, kind in containers:
        new.__dict__[name] = kind()
    return new


@functools.cache
def _beginning(cls: type[nn.Module]) -> tuple[dict[str, Any], list[tuple[str, type[Any]]]]:
    state = vars(cls())
    containers = [(name, type(value)) for name, value in state.items() if isinstance(value, dict | set)]
    return {name: value for name, value in state.items() if not isinstance(value, dict | set)}, containers


def _attach_module(part: Part, holder: nn.Module, module: nn.Module) -> None:
    container = str(part.edit.rule.container)
    _child(holder, container, Container)._modules[part.edit.adapter] = module
    part.__dict__["own"] = module
    for param in part.edit.params:
        path, _, leaf = param.key.rpartition(".")
        part.owners[param.key] = (module.get_submodule(path), leaf)


def _copy_of(module: nn.Module, places: Places) -> nn.Module:
    """A real copy of `module`, as it was before any rewrite, for an adapter to train."""
    others = module._modules.pop(MODULES_TO_SAVE, None)
    try:
        sharded = {
            name for name, tensor in module.named_parameters() if is_sharded(tensor) and id(tensor) not in places.laid
        }
        return _gathered(_without_layout_hooks(pristine_copy(module)), sharded)
    finally:
        if others is not None:
            module._modules[MODULES_TO_SAVE] = others


def gathered_copy(model: nn.Module, path: str) -> nn.Module:
    """The module `path` of `model`, or a copy with whole tensors where FSDP2 has sharded it: one to be called alone."""
    module, known = model.get_submodule(path), managed(model)
    sharded = [name for name, tensor in module.named_parameters() if id(tensor) in known]
    return _gathered(pristine_copy(module), sharded) if sharded else module


def _without_layout_hooks(module: nn.Module) -> nn.Module:
    """`module` without the hooks that lay out its inputs and outputs, for a copy that is called inside of them."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "__qualname__", "").startswith("distribute_module.<locals>"):
                del hooks[number]
    return module


def _gathered(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """`module` with whole tensors of these `names`, where FSDP2 gathers those that it copies, and not its own."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        inner = module.get_submodule(path)
        tensor = inner.get_parameter(leaf)
        inner._parameters[leaf] = nn.Parameter(whole(tensor), tensor.requires_grad)
    return module


def _encoder(part: Part, holder: nn.Module, spec: AdapterSpec) -> nn.Module:
    like = next(holder.parameters())
    module = part.edit.rule.module(spec, part.site)
    module = module.to(device=like.device, dtype=dtype_of(part.edit.params[0].dtype))
    return module.train(holder.training).requires_grad_(False)


def _allocated(part: Part, param: PlannedParam, device: torch.device, layout: Layout | None) -> Tensor:
    dtype = dtype_of(param.dtype)
    try:
        if layout is not None:
            return layout.empty(param.shape, dtype, param.axes)
        return torch.empty(param.shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        raise AdapterError(
            f"{part.edit.site}: {param.key} of shape {list(param.shape)} ({param.numel * dtype.itemsize:,} bytes) can't be"
            f" allocated on {device}; is its size in the spec of {part.edit.adapter!r} meant?"
            f" ({str(error).splitlines()[0]})"
        ) from None


def detach(edit: Edit, holder: nn.Module, root: nn.Module) -> None:
    """Take what `edit` added off again."""
    shared = [param.key.partition(".")[0] for param in edit.params if param.shared]
    for module, names in ((holder, containers(edit)), (root, shared)):
        for first in names:
            container = module._modules.get(first)
            if isinstance(container, nn.ModuleDict | nn.ParameterDict):
                if edit.adapter in container:
                    del container[edit.adapter]
                if not len(container):
                    del module._modules[first]


def weight_of(owner: nn.Module, site: Site) -> nn.Parameter | None:
    """The weight of `site` in its owner, if it has a plain one."""
    if not isinstance(site, WeightSite) or site.weight is None:
        return None
    path = site.weight.removeprefix(f"{site.owner}.") if site.owner else site.weight
    inner, _, leaf = path.rpartition(".")
    return (owner.get_submodule(inner) if inner else owner)._parameters.get(leaf)
