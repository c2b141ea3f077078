"""Fitting the keys of a file to those an adapter has: older spellings, what is left over, and how that is told."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from torch import Tensor

from peftc.errors import CheckpointError, nearest
from peftc.graph.sites import transformers_config
from peftc.plan import MODULES_TO_SAVE
from peftc.rewrite.program import Program
from peftc.view.text import span


@dataclass(frozen=True)
class LoadResult:
    """How a file fitted an adapter. `missing_keys` were left as a new adapter has them, `unexpected_keys` were not used.

    `mismatched_keys`: key, the file's shape, the adapter's. `renamed`: the file's key by the adapter's, where a spelling
    of another version was understood. `casts`: by key, the file's dtype and the adapter's, where they differ.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    casts: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    @property
    def fits(self) -> bool:
        """Whether every key found its place."""
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_keys)


def respelled(program: Program, prefix: str, keys: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, str]:
    """The adapter's key by the file's, where one is a known spelling of the other; the rest as they are."""
    found = {key: key for key in keys}
    others = [key for key in found if key not in own]
    models = _model_names(program) if others else _Names("", ())
    for key in others:
        candidates = [*_older_peft(key), *_other_model(key, prefix, models)]
        found[key] = next((candidate for candidate in candidates if candidate in own), key)
    return found


def require_fit(result: LoadResult, own: Mapping[str, Tensor], where: str, strict: bool) -> str | None:
    """Raise CheckpointError with everything that does not fit; without `strict`, return that as a text."""
    if result.fits:
        return None
    lines = [f"{where}: does not fit the adapter, which has {len(own)} tensors."]
    groups: list[tuple[str, Sequence[str]]] = [
        ("missing", result.missing_keys),
        ("unexpected", result.unexpected_keys),
        ("mis-shaped", [f"{key} {list(file)}, here {list(here)}" for key, file, here in result.mismatched_keys]),
    ]
    for label, keys in groups:
        shown = _collapsed(keys)
        more = [f"    … and {len(shown) - 8} more groups"] if len(shown) > 8 else []
        lines += [f"  {len(keys)} {label}:", *(f"    {line}" for line in shown[:8]), *more] if keys else []
    for key in result.unexpected_keys[:3]:
        near = nearest(key, result.missing_keys or own, limit=1)
        lines += [f"  Nearest to {key}: {near[0]}"] if near else []
    if strict:
        vocabulary = any("embed" in key or "lm_head" in key for key, _, _ in result.mismatched_keys)
        lines.append(
            "  Is the base model the one the adapter was trained on?"
            + (" A resized vocabulary needs resize_token_embeddings first." if vocabulary else "")
            + " strict=False takes what fits."
        )
        raise CheckpointError("\n".join(lines))
    return "\n".join(lines)


def _collapsed(keys: Sequence[str]) -> list[str]:
    """Keys that differ only in numbers, together: `layers.{0–79}.q_proj.lora_A.weight (80)`."""
    order = sorted(range(len(keys)), key=lambda i: (_shape(keys[i]), i))
    lines: list[str] = []
    for _, group in groupby(order, key=lambda i: _shape(keys[i])):
        names = [keys[i] for i in group]
        lines.append(names[0] if len(names) == 1 else f"{span(names)} ({len(names)})")
    return lines


def _shape(key: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", key)


def _older_peft(key: str) -> list[str]:
    """Keys of older PEFT versions, and of modules_to_save and biases, which have had two spellings."""
    spellings = (
        (f"{MODULES_TO_SAVE}.default.", ""),
        (f"{MODULES_TO_SAVE}.", ""),
        ("base_layer.bias", "bias"),
        (".bias", ".base_layer.bias"),
    )
    return [key.replace(old, new) for old, new in spellings if old in key]


def _other_model(key: str, prefix: str, models: "_Names") -> list[str]:
    """The key as another version of transformers, or the model with or without its head, would have it."""
    name = key.removeprefix(prefix)
    if name == key:
        return []
    candidates = [name.removeprefix(f"{models.prefix}."), f"{models.prefix}.{name}"] if models.prefix else []
    site, tail = _at_adapter(name)
    renamed = models.rename(f"{site}.weight")
    if renamed.endswith(".weight"):
        candidates.append(renamed.removesuffix("weight") + tail)
    return [prefix + candidate for candidate in candidates]


def _at_adapter(name: str) -> tuple[str, str]:
    """A key's module, and what an adapter has there (`lora_A.weight`); the last part, if it is of a saved module."""
    match = re.search(r"\.(lora_\w+|ia3_l|base_layer|\w+$)(\..*)?$", name)
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


def _model_names(program: Program) -> _Names:
    if transformers_config(program.base) is None:
        return _Names("", ())
    base = cast(Any, program.base)
    return _Names(str(base.base_model_prefix), checkpoint_renamings(base))


def checkpoint_renamings(model: Any) -> list[Any]:
    """transformers' own renamings of checkpoint keys for a model of it (there since version 5)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
