"""Putting an adapter's tensors on the modules of its sites, and taking them off."""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftc.errors import AdapterError, RuleError
from peftc.graph.region import OPAQUE
from peftc.graph.sites import Site, dtype_of, modules_at, parameter_name
from peftc.plan import MODULES_TO_SAVE, Edit, Plan, PlannedParam
from peftc.plan.calls import PROMPT_ENCODER
from peftc.registry import find_prompt_rule, find_rule
from peftc.rewrite.host import original_class
from peftc.rule import Bound, fill


class Holder(nn.Module):
    """Holds the parameters of one adapter under their PEFT names. The generated code reads them; it is never called.

    So a hook on it would never run, and one of accelerate's that offloads would leave the code to compute with the
    memory of nothing: that is refused, with AdapterError.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and getattr(value, "offload", False):
            raise AdapterError(
                "accelerate can't offload the parameters of an adapter: generated code reads them past its hooks."
                " Offloading has begun, so load the model again, and compile it without offloading."
            )
        super().__setattr__(name, value)


def container_of(site: Site) -> tuple[str, str]:
    """The module that gets a child to hold the adapters of a parameter site, and the name of that child."""
    assert site.host is not None, "a parameter has one"
    leaf = site.fqn.removeprefix(f"{site.host}.")
    return site.host, f"adapted_{leaf.replace('.', '_')}"


def owner_name(site: Site) -> str:
    """The fqn of the module that holds the adapters of `site`: itself, or for a parameter a child of its host."""
    return site.fqn if site.kind != "parameter" else parameter_name(*container_of(site))


def check_names(model: nn.Module, plan: Plan, adapters: Collection[str]) -> None:
    """Refuse adapter names that can't be part of a parameter's name, and sites that have such a child already."""
    taken = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
    for name in adapters:
        if not isinstance(cast(Any, name), str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name) or name in taken:
            raise AdapterError(
                f"adapter name {name!r}: it becomes part of parameter names; use letters, digits, '_' and '-'"
                " (and no method name of nn.ModuleDict)"
            )
    places = {fqn: container_of(site)[0] if site.kind == "parameter" else fqn for fqn, site in plan.sites.items()}
    modules = modules_at(model, places.values())
    for edit in (edit for edit in plan.edits if edit.adapter in adapters):
        site, module = plan.sites[edit.site], modules[places[edit.site]]
        parameter = site.kind == "parameter"
        for first in [container_of(site)[1]] if parameter else containers(edit):
            if first in module._modules or first in module._parameters or first in module.__dict__:
                raise AdapterError(
                    f"{edit.site}: has a child {first!r} already. A compiled or PEFT model can't be compiled again:"
                    " use add_adapter, or unload it first."
                )


def containers(edit: Edit) -> list[str]:
    """The names of the containers that an edit adds to its site."""
    if edit.rule == MODULES_TO_SAVE:
        return [MODULES_TO_SAVE]
    used = [name for name, probability in edit.dropouts.items() if probability > 0]
    return list(dict.fromkeys([*(param.key.partition(".")[0] for param in edit.params), *used]))


def attach(module: nn.Module, edit: Edit, plan: Plan, weight: nn.Parameter | None, fresh: bool) -> None:
    """Create the parameters and dropouts of `edit` on its module, initialised as the rule says; or its trained copy.

    `weight`: that of the site, for rules that start from it, and for the device. `fresh=False`: values are about to be
    loaded, and `start` is for those that are not.
    """
    if edit.rule == MODULES_TO_SAVE:
        _attach_copy(module, edit)
        return
    if edit.virtual:
        _attach_encoder(module, edit, plan, fresh)
        return
    device = weight.device if weight is not None else torch.device(plan.sites[edit.site].device)
    tensors = {param.name: _allocated(edit, param, device) for param in edit.params}
    if fresh:
        start(edit, tensors, weight, plan)
    for param in edit.params:
        first, dot, rest = param.key.partition(".")
        parameter = nn.Parameter(tensors[param.name], requires_grad=False)
        if dot:
            holders = module._modules.setdefault(first, nn.ModuleDict())
            assert isinstance(holders, nn.ModuleDict)
            # The names were checked before, so there is no need to look for them again in every module.
            holder = holders._modules.get(edit.adapter)
            if holder is None:
                holder = holders._modules[edit.adapter] = Holder()
            holder._parameters[rest] = parameter
        else:
            parameters = module._modules.setdefault(first, nn.ParameterDict())
            assert isinstance(parameters, nn.ParameterDict)
            parameters[edit.adapter] = parameter
    for name, probability in edit.dropouts.items():
        if probability > 0:
            dropouts = module._modules.setdefault(name, nn.ModuleDict())
            assert isinstance(dropouts, nn.ModuleDict)
            dropouts[edit.adapter] = nn.Dropout(probability).train(module.training)


def _allocated(edit: Edit, param: PlannedParam, device: torch.device) -> Tensor:
    dtype = dtype_of(param.dtype)
    try:
        return torch.empty(param.shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        raise AdapterError(
            f"{edit.site}: {param.key} of shape {list(param.shape)} ({param.numel * dtype.itemsize:,} bytes) can't be"
            f" allocated on {device}; is its size in the spec of {edit.adapter!r} meant? ({str(error).splitlines()[0]})"
        ) from None


def start(edit: Edit, tensors: Mapping[str, Tensor], weight: nn.Parameter | None, plan: Plan) -> None:
    """Initialise `tensors`, parameters of `edit` by their names in the rule, as a new adapter has them."""
    given = [param for param in edit.params if param.name in tensors and not tensors[param.name].is_meta]
    own = [param for param in given if param.init == "rule"]
    for param in given:
        if param.init != "rule":
            fill(tensors[param.name], param.init)
    if not own:
        return
    site = plan.sites[edit.site]
    rule = find_rule(plan.adapters[edit.adapter], site)
    assert rule is not None, site
    assert weight is not None, "the rule's check() asks for a weight"
    shapes = {param.name: param.shape for param in edit.params if param.init == "rule"}
    try:
        values = rule.initialise(canonical(weight.detach(), site).float(), shapes, Bound(edit.constants))
        for param in own:
            tensors[param.name].copy_(values[param.name])
    except (NotImplementedError, KeyError, RuntimeError, TypeError) as error:
        raise RuleError(f"rule {rule.name!r} ({type(rule).__name__}.initialise) at {edit.site}: {error!r}") from error


def canonical(weight: Tensor, site: Site) -> Tensor:
    """`weight` as rules see it, (out, in, *kernel) or (experts, out, in): a view, turned where it is stored otherwise."""
    return weight.mT if site.layout == "in_out" else weight


def _attach_encoder(module: nn.Module, edit: Edit, plan: Plan, fresh: bool) -> None:
    spec = plan.adapters[edit.adapter]
    rule = find_prompt_rule(spec)
    assert rule is not None, "the plan was made with it"
    path = str(edit.constants["embedding"])
    embedding = module.get_submodule(path) if path else None
    like = next((embedding or module).parameters())
    encoder = rule.encoder(spec).to(device=like.device, dtype=dtype_of(edit.params[0].dtype)).train(module.training)
    if fresh and embedding is not None and not like.is_meta and not spec.inference_mode:
        with torch.no_grad():
            rule.start(encoder, spec, lambda ids: embedding(ids.to(like.device)), like.shape[0])
    encoders = module._modules.setdefault(PROMPT_ENCODER, nn.ModuleDict())
    assert isinstance(encoders, nn.ModuleDict)
    encoders[edit.adapter] = encoder.requires_grad_(False)


def _attach_copy(module: nn.Module, edit: Edit) -> None:
    """A real copy of `module`, as it was before any rewrite, for `edit` to train."""
    cls = type(module)
    others = module._modules.pop(MODULES_TO_SAVE, None)
    opaque = module.__dict__.pop(OPAQUE, None)
    module.__class__ = original_class(module)
    try:
        fresh = copy.deepcopy(module)
    finally:
        module.__class__ = cls
        if opaque is not None:
            module.__dict__[OPAQUE] = opaque
    copies = others if isinstance(others, nn.ModuleDict) else nn.ModuleDict()
    copies[edit.adapter] = fresh
    module._modules[MODULES_TO_SAVE] = copies


def detach(module: nn.Module, edit: Edit) -> None:
    for first in containers(edit):
        container = module._modules.get(first)
        if isinstance(container, nn.ModuleDict | nn.ParameterDict):
            if edit.adapter in container:
                del container[edit.adapter]
            if not len(container):
                del module._modules[first]
