"""How the keys of adapters are spelled, and were by other versions of PEFT and of transformers."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from peftc.graph.sites import is_pretrained
from peftc.plan import MODULES_TO_SAVE
from peftc.plan.match import selects
from peftc.registry import companions_of, own_rules, rules_of
from peftc.specs import AdapterSpec, ParameterSelection

# What wrappers of modules put into names: torch.compile, FSDP, torch's activation checkpointing.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def by_plain_names(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's tensors by their names in the base; those given may carry wrappers and the compiled model's own."""
    return {unwrapped(name).removeprefix("module.").removeprefix("base."): value for name, value in full.items()}


def unwrapped(name: str) -> str:
    """`name` without what wrappers of modules put into it."""
    return _WRAPPERS.sub("", name) if "_" in name else name


def base_name(spec: AdapterSpec, key: str) -> str:
    """The name of the parameter that `key` is of the base, if it is of one: without what wraps its module in PEFT."""
    name = key.removeprefix(spec.key_prefix)
    for inside in (one.kept_in for one in companions_of(spec)):
        name = name.replace(f".{inside}.base_layer.", ".")
    return name.replace(".base_layer.", ".")


def respelled(
    model: nn.Module, spec: AdapterSpec, keys: Iterable[str], own: Container[str], base: Container[str]
) -> dict[str, str]:
    """The adapter's key by the file's, where one is a known spelling of the other; the rest as they are.

    `own`: the adapter's keys; `base`: parameters of the model, which a file may bring whole.
    """

    prefix, at_adapter = spec.key_prefix, _tails(spec)
    found = {key: key for key in keys}
    others = [key for key in found if key not in own]
    names = _names_in(model) if others else _Names("", ())
    for key in others:
        plain = _without_wrappers(key, spec.key_prefix)
        older = list(dict.fromkeys([key, plain, *_older_peft(plain, spec)]))
        candidates = [*older, *(other for one in older for other in _other_model(one, prefix, names, at_adapter))]
        mine = next((candidate for candidate in candidates if candidate in own), None)
        found[key] = mine or next((candidate for candidate in candidates if base_name(spec, candidate) in base), key)
    return found


def _without_wrappers(key: str, prefix: str) -> str:
    """The key without what a wrapped base, or a wrapped adapted model, left in it (`_orig_mod.`, DDP's `module.`)."""
    plain = unwrapped(key)
    while plain.startswith("module."):
        plain = plain.removeprefix("module.")
    inner = plain.removeprefix(prefix)
    return prefix + inner.removeprefix("module.") if plain.startswith(prefix) else plain


def respelled_spec(model: nn.Module, spec: AdapterSpec, keys: Iterable[str]) -> AdapterSpec:
    """The spec of a file in the names that `model` has, where the file's are those of another version of transformers.

    If plain names that match both are all that it goes by, it stays. Else its `target_modules` become the fqns of the
    modules that the file has tensors for, and ranks, alphas and feed-forward modules are said for each.
    """
    if spec.target_modules is None or not is_pretrained(model):
        return spec
    moved, adapted = _moved(model, spec, keys)
    if all(new == old for old, new in moved.items()):
        return spec
    update: dict[str, Any] = {}
    if spec.modules_to_save is not None:
        update["modules_to_save"] = tuple(_container(name, moved) for name in spec.modules_to_save)
    if adapted and (not _goes_by_plain_names(spec, adapted.values()) or _takes_more(model, spec, adapted)):
        spec = spec.respelled(adapted)
    return spec.model_copy(update=update).renamed(lambda name: _container(name, moved))


def _goes_by_plain_names(spec: AdapterSpec, fqns: Iterable[str]) -> bool:
    """Whether nothing in `spec` depends on more than the ends of names, and these select all of `fqns`."""
    targets = spec.named_targets
    if not spec.goes_by_plain_names or spec.target_modules is None:
        return False
    return targets == "all-linear" or all(selects(targets, fqn) for fqn in fqns)


def _takes_more(model: nn.Module, spec: AdapterSpec, adapted: Mapping[str, str]) -> bool:
    """Whether the spec's names select modules of other parts of the model too (a vision tower), which the file has not."""
    if not isinstance(spec.target_modules, tuple) or all(old == new for old, new in adapted.items()):
        return False
    names = set(adapted.values())
    tops = {new.partition(text)[0] + text for new in names for text in _TEXTS if text in new}
    outside = (fqn for fqn, _ in model.named_modules() if not fqn.startswith(tuple(tops)))
    return bool(tops) and any(selects(spec.target_modules, fqn) and fqn not in names for fqn in outside)


def _container(name: str, moved: Mapping[str, str]) -> str:
    """What a module, named in full, is called in the model: by what lies in it."""
    for old, new in moved.items():
        inner = old.removeprefix(name)
        if old.startswith((name, f"{name}.")) and inner[:1] in ("", ".") and new.endswith(inner):
            return new.removesuffix(inner)
    return name


def _moved(model: nn.Module, spec: AdapterSpec, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """By module of the file, the module of `model` that it is (itself, if there is none); of all, and of those adapted."""
    prefix, at_adapter = spec.key_prefix, _tails(spec)
    firsts = frozenset(name for rule in own_rules(spec) for name in rule.keys)
    known = dict[str, nn.Module | None]({"": model})

    def module(fqn: str) -> nn.Module | None:
        if fqn not in known:
            parent, _, name = fqn.rpartition(".")
            above = module(parent)
            known[fqn] = None if above is None else above._modules.get(name)
        return known[fqn]

    parameters = (spec.target_parameters or ()) if isinstance(spec, ParameterSelection) else ()
    hosts = [name.rpartition(".")[0] for name in parameters]
    names: _Names | None = None
    moved, adapted = dict[str, str](), dict[str, str]()
    for key in keys:
        old, tail = _at_adapter(key.removeprefix(prefix), at_adapter)
        if old not in moved:
            moved[old] = old
            if module(old) is None:
                names = _names_in(model) if names is None else names
                others = [
                    _at_adapter(other.removeprefix(prefix), at_adapter)[0]
                    for other in _other_model(key, prefix, names, at_adapter)
                ]
                moved[old] = next((other for other in others if module(other) is not None), old)
        if tail.partition(".")[0] in firsts and not selects(hosts, old):
            adapted[old] = moved[old]
    return moved, adapted


def _older_peft(key: str, spec: AdapterSpec) -> list[str]:
    """Keys of older PEFT versions, and of modules_to_save and biases, which have had two spellings."""
    own = [re.sub(pattern, new, key) for rule in rules_of(spec) for pattern, new in rule.spellings]
    spellings = (
        (f"{MODULES_TO_SAVE}.default.", ""),
        (f"{MODULES_TO_SAVE}.", ""),
        ("base_layer.bias", "bias"),
        (".bias", ".base_layer.bias"),
    )
    return [*(new for new in own if new != key), *(key.replace(old, new) for old, new in spellings if old in key)]


def _other_model(key: str, prefix: str, names: "_Names", at_adapter: re.Pattern[str]) -> list[str]:
    """The key as another version of transformers, or the model with or without its head, would have it."""
    name = key.removeprefix(prefix)
    if name == key:
        return []
    candidates = [name.removeprefix(f"{names.prefix}."), f"{names.prefix}.{name}"] if names.prefix else []
    candidates += _in_or_out_of_family(name)
    site, tail = _at_adapter(name, at_adapter)
    renamed = names.rename(f"{site}.weight")
    if renamed.endswith(".weight"):
        candidates.append(renamed.removesuffix("weight") + tail)
    return [prefix + candidate for candidate in candidates]


def _in_or_out_of_family(name: str) -> list[str]:
    """What a text model's module is called in the multimodal model of its family, or the other way round."""
    inside = [name.replace(text, "", 1) for text in _TEXTS if text in name]
    inner = name.removeprefix("model.")
    return inside or [new for text in _TEXTS for new in (f"model.{text}{inner}", f"{text}{name}", f"{text}{inner}")]


# What transformers calls the text model in a multimodal one.
_TEXTS = ("language_model.", "text_model.")


def _firsts(spec: AdapterSpec) -> frozenset[str]:
    """The first names that tensors of the adapter have in files."""
    inside = (one.kept_in for one in companions_of(spec))
    return frozenset(name for rule in rules_of(spec) for name in rule.keys) | {
        name for name in inside if name is not None
    }


def _tails(spec: AdapterSpec) -> re.Pattern[str]:
    """What in a key begins an adapter's own part of it; the last part, if it is of a saved module."""
    firsts = "|".join(map(re.escape, sorted(_firsts(spec))))
    return re.compile(rf"\.({firsts}{'|' if firsts else ''}base_layer|\w+$)(\..*)?$")


def _at_adapter(name: str, tails: re.Pattern[str]) -> tuple[str, str]:
    """A key's module, and what an adapter has there (`factor.weight`)."""
    match = tails.search(name)
    return (name[: match.start()], name[match.start() + 1 :]) if match else (name, "")


@dataclass(frozen=True)
class _Names:
    """How transformers names things in a model: the prefix of its backbone, and renamings between versions."""

    prefix: str
    renamings: Sequence[Any]

    def rename(self, name: str) -> str:
        for renaming in self.renamings:
            name = cast(str, renaming.rename_source_key(name)[0])
        return name


def _names_in(model: nn.Module) -> _Names:
    if not is_pretrained(model):
        return _Names("", ())
    base = cast(Any, model)
    return _Names(str(base.base_model_prefix), checkpoint_renamings(base))


def checkpoint_renamings(model: Any) -> list[Any]:
    """transformers' own renamings of checkpoint keys for a model of it (there since version 5)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
