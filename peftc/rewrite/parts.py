"""An adapter's live tensors: on the modules of its sites, under PEFT's names, and as generated code reads them."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, PeftcError, RuleError
from peftc.graph.hooked import device_of
from peftc.graph.sites import Site, WeightSite, canonical, dtype_of
from peftc.plan import MODULES_TO_SAVE, Edit, PlannedParam
from peftc.rewrite.holders import VALUE, Container, Holder, Vectors, code_path
from peftc.rewrite.sharding import Layout, Places, is_sharded, managed, own, put, spread, whole
from peftc.rewrite.views import pristine_copy
from peftc.rule import Argument, Bound, Rule, fill
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
        if self.edit.rule.container is not None:
            new.__dict__["own"] = getattr(getattr(holder, self.edit.rule.container), self.edit.adapter)
        return new

    def live(self, key: str) -> Tensor:
        """As `tensor`, by the way that generated code takes: on replicas too."""
        path = key if self.edit.rule.container is None else f"own.{key}"
        return operator.attrgetter(code_path(path))(self)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their names in the rule."""
        return {param.name: self.tensor(param.key) for param in self.edit.params}

    @property
    def module(self) -> nn.Module:
        """The adapter's module, of a rule whose adapters are modules."""
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
    return type(rule).begins is not Rule.begins


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
        module, (*inner, rest) = top, rest.split(".")
        for name in inner:
            module = _child(module, name, Holder)
        part.owners[param.key] = (module, rest)
    else:
        vectors = _child(holder, first, Vectors)
        top = module = vectors
        rest = adapter
        part.owners[param.key] = (vectors, adapter)
    if rest not in module._parameters:
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


def start(
    part: Part,
    spec: AdapterSpec,
    params: list[PlannedParam],
    host: nn.Module,
    weight: nn.Parameter | None,
    mesh: Any,
    sharing: Callable[[Edit, PlannedParam], Mapping[str, Tensor]],
    data: Any = None,
) -> None:
    """Initialise `params` of a part as a new adapter has them: the same on all processes of `mesh`, if that is not None.

    `host`: the site's module, `weight` its weight; `sharing` gives the weights of the sites that share a parameter; `data`:
    what calibration found there.
    """
    if part.edit.rule.container is not None:
        if params and not part.edit.whole:
            with torch.no_grad():
                inside = functools.partial(gathered_copy, host)
                part.edit.rule.start_module(part.module, spec, part.edit.constants, host, inside)
            spread(part.module.parameters(), mesh)
        return
    live = {param.name: part.tensor(param.key) for param in params}
    given = [param for param in params if not live[param.name].is_meta]
    tensors = {param.name: _unsharded(live[param.name]) for param in given}
    by_rule = [param for param in given if param.init == "rule"]
    for param in given:
        if param.init == "derived":
            derive(part, param, tensors[param.name], weight)
        elif param.init == "gathered":
            with torch.no_grad():
                tensors[param.name].copy_(gathered(part.edit, param, sharing(part.edit, param)))
        elif param.init not in ("rule", "drawn"):
            fill(tensors[param.name], param.init, param.seed)
    _start_drawn(part.edit, {param.name: tensors[param.name] for param in given if param.init == "drawn"})
    if by_rule:
        _start_by_rule(part, by_rule, tensors, weight, host._parameters.get("bias"), data)
    spread(tensors.values(), mesh)
    for name, tensor in tensors.items():
        if is_sharded(live[name]):
            put(live[name], tensor)


def _unsharded(tensor: Tensor) -> Tensor:
    """A whole tensor to be filled in the place of a sharded one; any other is itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=own(tensor).device) if is_sharded(tensor) else tensor


def _start_drawn(edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    values = drawn(edit) if tensors else {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def drawn(edit: Edit) -> dict[str, Tensor]:
    """What the rule of `edit` draws, by name. Raises RuleError if the shapes are others than declared."""
    shapes = {param.name: param.shape for param in edit.params if param.init == "drawn"}
    values = edit.rule.draw(shapes, Bound(edit.constants))
    wrong = [name for name, shape in shapes.items() if name not in values or tuple(values[name].shape) != shape]
    if wrong:
        raise RuleError(f"rule {edit.rule.name!r} ({type(edit.rule).__name__}.draw): {wrong[0]} is not as declared")
    return values


def gathered(edit: Edit, param: PlannedParam, weights: Mapping[str, Tensor]) -> Tensor:
    """What the rule of `edit` makes of the `weights` of the sites that share `param`. Raises RuleError if it can't."""
    rule = edit.rule
    try:
        value = rule.gather(param.name, weights, Bound(edit.constants))
    except (NotImplementedError, RuntimeError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.gather): {param.key}: {error!r}") from error
    if tuple(value.shape) != param.shape:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.gather): {param.key} is not as declared")
    return value


def derive(part: Part, param: PlannedParam, tensor: Tensor, weight: nn.Parameter | None) -> None:
    """Fill `tensor` with what follows from the constants of an edit, or from its site's weight."""

    def stored() -> Tensor:
        assert weight is not None, "the rule's check() asks for a weight"
        assert isinstance(part.site, WeightSite), "other rules declare modules"
        require_there(part.edit, weight)
        return canonical(whole(weight), part.site)

    with torch.no_grad():
        value = part.edit.rule.derived(param.name, param.shape, Bound(part.edit.constants, {"weight": stored}))
        tensor.copy_(value)


def require_there(edit: Edit, weight: Tensor) -> None:
    """Raise AdapterError if `weight` has no values here to start from."""
    if weight.is_meta:
        raise AdapterError(
            f"{edit.site}: {edit.rule.name} starts from the weight here, which accelerate has offloaded. Load the model"
            " without offloading, or let the adapter start otherwise."
        )


def _start_by_rule(
    part: Part,
    params: list[PlannedParam],
    tensors: Mapping[str, Tensor],
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    data: Any,
) -> None:
    edit, rule, site = part.edit, part.edit.rule, part.site
    assert isinstance(site, WeightSite), "other rules declare modules"
    if weight is not None:
        require_there(part.edit, weight)
    shapes = {param.name: param.shape for param in edit.params if param.init == "rule"}
    loaded = shapes.keys() - {param.name for param in params}
    try:
        with torch.no_grad():
            base = torch.empty(0) if weight is None else wide(canonical(whole(weight), site))
            lazy: dict[str, Callable[[], Any]] = {
                "bias": lambda: None if bias is None else wide(whole(bias)),
                "data": lambda: data,
                "loaded": lambda: {name: whole(value) for name, value in part.tensors().items() if name in loaded},
            }
            values = rule.initialise(base, shapes, Bound({**_others(part, tensors, shapes), **edit.constants}, lazy))
            for param in params:
                tensors[param.name].copy_(values[param.name])
    except PeftcError:
        raise
    except (NotImplementedError, KeyError, RuntimeError, TypeError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.initialise) at {edit.site}: {error!r}") from error


def _others(part: Part, started: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters that have their values already, for those that start from them; `started` with them, whole."""
    names = [name for name in part.tensors() if name not in shapes]
    found = {name: started[name] if name in started else whole(part.tensors()[name]) for name in names}
    return {name: wide(tensor.detach()) for name, tensor in found.items()}


def wide(weight: Tensor) -> Tensor:
    """`weight` in float32 at least, as rules get it to start from."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


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
