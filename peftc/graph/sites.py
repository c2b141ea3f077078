"""The site index: every place of a model that a rule may rewrite, read without touching a weight."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from peftc.graph.hooked import device_of, given_class, is_offloaded
from peftc.graph.ops import Layout, Shape, is_packed, shapes


@dataclass(frozen=True)
class Site:
    """A place a rule may rewrite: what all kinds have in common. `op` is the name of a row of the table of ops.

    `module` is the class of the module that computes it. `dtype` and `device` are those of its tensors, `layer` the first
    number in its fqn, `role` its meaning, if the architecture is known (`attention.query`). `refusal` is the reason why
    the site can't be adapted.
    """

    fqn: str
    op: str
    module: str
    dtype: str = "float32"
    device: str = "cpu"
    layer: int | None = None
    role: str | None = None
    refusal: str | None = None

    @property
    def name(self) -> str:
        """What patterns match."""
        return self.fqn

    @property
    def owner(self) -> str:
        """The fqn of the module that computes it."""
        return self.fqn

    @property
    def added(self) -> str | None:
        """The name of a child that the owner is given to hold what adapters add, if they don't go on the owner itself."""
        return None

    @property
    def holder(self) -> str:
        """The fqn of the module whose children hold what adapters add."""
        return self.owner if self.added is None else parameter_name(self.owner, self.added)


@dataclass(frozen=True)
class ModuleSite(Site):
    """A module as a whole, of which an adapter trains a copy."""


@dataclass(frozen=True)
class WeightSite(Site):
    """A weight and the op that uses it.

    `out_features` × `in_features` is the canonical weight; `layout` says how the stored weight lies (`in_out`:
    transposed, as in transformers' Conv1D and in embeddings, whose "input" is the one-hot token). For convolutions the
    features are channels, `kernel_size` the rest of the weight's shape and `groups` theirs. `experts`: how many matrices
    the weight stacks, (experts, out, in). `weight` and `bias` are their fqns, None where there is no plain parameter;
    `tied` the names of the weight, if it has several. `no_fold` is the reason why nothing can be merged into the weight.

    Of an op that a module is, the site has the module's fqn. Other weights are sites by their own names: `host` is the
    module that computes with one, and patterns match it by `known_as`.
    """

    in_features: int = 0
    out_features: int = 0
    layout: Layout = "out_in"
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    experts: int | None = None
    weight: str | None = None
    bias: str | None = None
    tied: tuple[str, ...] = ()
    host: str | None = None
    known_as: str | None = None
    no_fold: str | None = None

    @property
    def name(self) -> str:
        """What patterns match."""
        return self.fqn if self.known_as is None else self.known_as

    @property
    def owner(self) -> str:
        """The fqn of the module that computes with the weight."""
        return self.fqn if self.host is None else self.host

    @property
    def has_plain_weight(self) -> bool:
        """Whether its weight can be computed with: floating-point numbers of two bytes or more; a quantised one can't."""
        dtype = dtype_of(self.dtype)
        return self.weight is not None and dtype.is_floating_point and dtype.itemsize > 1

    @property
    def has_wide_weight(self) -> bool:
        """Whether it has a plain weight whose sum, or product, with something small keeps what that says."""
        return self.weight is not None and self.dtype in ("float32", "float64")

    @property
    def added(self) -> str | None:
        """A child of the owner for this weight, which is one of several."""
        if self.host is None:
            return None
        leaf = self.fqn.removeprefix(f"{self.host}.") if self.host else self.fqn
        return f"adapted_{leaf.replace('.', '_')}"


def canonical(weight: Tensor, site: WeightSite) -> Tensor:
    """`weight` as rules see it, (out, in, *kernel) or (experts, out, in): a view, turned where it is stored otherwise."""
    return weight.mT if site.layout == "in_out" else weight


@dataclass(frozen=True)
class SiteIndex:
    """The sites of a model in module order, with what is needed to explain a miss.

    `modules` maps the fqn of every module to its class name; `aliases` a second name of a shared module to its first;
    `parameters` lists name, shape and dtype of every parameter, `ties` the groups of names that are one tensor.
    `inner` holds the sites that are parameters of modules which are no sites themselves, or of attention modules;
    `hosted` has their fqns by those modules.
    """

    sites: Mapping[str, WeightSite]
    modules: Mapping[str, str]
    aliases: Mapping[str, str]
    parameters: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    ties: tuple[tuple[str, ...], ...]
    model_type: str | None
    input_embedding: str | None
    output_embedding: str | None
    inner: Mapping[str, WeightSite]
    hosted: Mapping[str, tuple[str, ...]]


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@cache
def dtype_of(name: str) -> torch.dtype:
    """torch.bfloat16 for `bfloat16`."""
    return cast(torch.dtype, getattr(torch, name))


def layer_index(fqn: str) -> int | None:
    """The first number in `fqn`: the index of the layer the module is in."""
    return next((int(part) for part in fqn.split(".") if part.isascii() and part.isdigit()), None)


def parameter_name(module: str, name: str) -> str:
    """The fqn of parameter `name` of module `module`."""
    return f"{module}.{name}" if module else name


def is_inside(fqn: str, modules: Iterable[str]) -> bool:
    """Whether `fqn` is one of `modules`, or in one."""
    return any(fqn == module or fqn.startswith(f"{module}.") for module in modules)


def index_sites(model: nn.Module, role_of: Callable[[str], str | None]) -> SiteIndex:
    """All sites of `model`; `role_of` gives the role of a name. Reads structure only: a model on the meta device is as good
    as any.
    """
    first: dict[int, str] = {}
    modules: dict[str, str] = {}
    aliases: dict[str, str] = {}
    found: list[tuple[str, nn.Module]] = []
    for fqn, module in _walk(model):
        known = first.setdefault(id(module), fqn)
        if known != fqn:
            aliases[fqn] = known
            continue
        modules[fqn] = given_class(type(module)).__name__
        if not isinstance(module, torch.jit.ScriptModule):  # Its code and tensors are not Python's.
            found.append((fqn, module))
    # Not by the second name of a shared module: that is the same parameter of the same module.
    named = [
        (parameter_name(fqn, name), parameter)
        for fqn, module in found
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    ties = _ties(named)
    tied = {name: group for group in ties for name in group}
    sites: dict[str, WeightSite] = {}
    inner: dict[str, WeightSite] = {}
    hosted: dict[str, tuple[str, ...]] = {}
    for fqn, module in found:
        site = _site(fqn, module, tied, role_of)
        if site is not None:
            sites[fqn] = site
        if site is None or site.op == "attention":
            own = parameter_sites(fqn, module, tied, role_of)
            inner |= {parameter.fqn: parameter for parameter in own}
            hosted[fqn] = tuple(parameter.fqn for parameter in own)
    parameters = {id(p): (name, _shape(p), p.dtype) for name, p in reversed(named)}
    return SiteIndex(
        sites=sites,
        modules=modules,
        aliases=aliases,
        parameters=tuple(reversed(parameters.values())),
        ties=ties,
        model_type=getattr(transformers_config(model), "model_type", None),
        input_embedding=_embedding_of(model, "get_input_embeddings", first),
        output_embedding=_embedding_of(model, "get_output_embeddings", first) if is_pretrained(model) else None,
        inner=inner,
        hosted=hosted,
    )


def transformers_config(model: nn.Module) -> Any | None:
    """The transformers config of `model`, or None. Does not import transformers: a model of it has."""
    transformers = sys.modules.get("transformers")
    config = getattr(model, "config", None)
    if transformers is None or not isinstance(config, transformers.PretrainedConfig):
        return None
    return config


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of transformers itself, not one of another class with such a config."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _embedding_of(model: nn.Module, getter: str, first: Mapping[int, str]) -> str | None:
    """The fqn of what a model names as its embedding, in or out (the `lm_head`), if it does."""
    get = getattr(model, getter, None)
    try:
        embedding = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # Models of sound and images have none.
        return None
    return first.get(id(embedding)) if embedding is not None else None


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(fqn, module) for every path; a shared module comes once for each of its paths, its children once."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        fqn, module = stack.pop()
        yield fqn, module
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        stack.extend((parameter_name(fqn, name), child) for name, child in reversed(children))


def _ties(named: Sequence[tuple[str, nn.Parameter]]) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that share one tensor, or one storage in the same way."""
    groups: dict[Any, list[str]] = {}
    for name, parameter in named:
        groups.setdefault(_identity(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def is_lazy(parameter: nn.Parameter) -> bool:
    """Whether `parameter` has no shape yet (nn.LazyLinear)."""
    return isinstance(parameter, UninitializedParameter)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return () if is_lazy(parameter) else tuple(parameter.shape)


def _identity(parameter: nn.Parameter) -> Any:
    """What two tied parameters have in common: the object, or storage, offset and shape."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta and type(parameter.data) is torch.Tensor
    if not plain or parameter.numel() == 0:
        return id(parameter)
    return parameter.untyped_storage()._cdata, parameter.storage_offset(), parameter.shape, parameter.stride()


def _shaped(module: nn.Module) -> tuple[str, Shape] | None:
    """The op that `module` is, and the sizes of its weight."""
    for name, shape_of in shapes():
        shape = shape_of(module)
        if shape is not None:
            return name, shape
    return None


def _site(
    fqn: str,
    module: nn.Module,
    tied: Mapping[str, tuple[str, ...]],
    role_of: Callable[[str], str | None],
) -> WeightSite | None:
    found = _shaped(module)
    if found is None:
        return None
    op, shape = found
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    reference = weight if weight is not None else next(iter([*module.parameters(), *module.buffers()]), None)
    return WeightSite(
        fqn=fqn,
        op=op,
        module=given_class(type(module)).__name__,
        in_features=shape.in_features,
        out_features=shape.out_features,
        layout=shape.layout,
        kernel_size=shape.kernel_size,
        groups=shape.groups,
        weight=parameter_name(fqn, "weight") if weight is not None else None,
        bias=parameter_name(fqn, "bias") if bias is not None else None,
        dtype=dtype_name(reference.dtype) if reference is not None else "float32",
        device=str(device_of(module, reference)) if reference is not None else "cpu",
        layer=layer_index(fqn),
        role=role_of(fqn),
        tied=tied.get(parameter_name(fqn, "weight"), ()) if weight is not None else (),
        refusal=_refusal(module, weight),
        no_fold=_no_fold(module, weight),
    )


def _no_fold(module: nn.Module, weight: nn.Parameter | None) -> str | None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm would scale what is merged into it"
    if is_offloaded(module, weight):
        return "accelerate has offloaded its weight; merge_checkpoint merges on disk"
    packed = weight is not None and type(weight) is not nn.Parameter and is_packed(weight)
    return f"its weight is quantised, as {type(weight).__name__}" if packed else None


def _refusal(module: nn.Module, weight: nn.Parameter | None) -> str | None:
    if weight is not None and is_lazy(weight):
        return "its weight has no shape yet: run the model once on an example input first"
    if weight is not None and weight.is_complex():
        return f"its weight is {dtype_name(weight.dtype)}; adapters are real"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code can't be rewritten: load the model as Python"
    return None


def parameter_sites(
    fqn: str, module: nn.Module, tied: Mapping[str, tuple[str, ...]], role_of: Callable[[str], str | None]
) -> list[WeightSite]:
    """The weights that `module` computes with itself: matrices, one for each expert where there are three dimensions.

    Of nn.MultiheadAttention also the weight of `out_proj`, which it never calls.
    """
    attention = isinstance(module, nn.MultiheadAttention)
    names = [name for name, p in module._parameters.items() if p is not None and not is_lazy(p) and p.dim() in (2, 3)]
    if attention:
        names = [name for name in names if name.endswith("_weight")]
    # Experts say in which order they store theirs; (experts, out, in) if they don't, as in PEFT.
    turned = bool(module.__dict__.get("is_transposed", False))
    sites: list[WeightSite] = []
    for name in [*names, *(["out_proj.weight"] if attention else [])]:
        weight = module.get_parameter(name)
        layout: Layout = "in_out" if turned and weight.dim() == 3 else "out_in"
        rows, columns = weight.shape[-2:] if layout == "out_in" else weight.shape[:-3:-1]
        own = parameter_name(fqn, name)
        sites.append(
            WeightSite(
                fqn=own,
                op="parameter",
                module=given_class(type(module)).__name__,
                in_features=columns,
                out_features=rows,
                layout=layout,
                experts=weight.shape[0] if weight.dim() == 3 else None,
                weight=own,
                dtype=dtype_name(weight.dtype),
                device=str(weight.device),
                layer=layer_index(fqn),
                role=role_of(own),
                tied=tied.get(own, ()),
                host=fqn,
                known_as=fqn if attention else None,
            )
        )
    return sites
