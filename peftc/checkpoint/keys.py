"""Fitting the keys of a file to those an adapter has: older spellings, what is left over, and how that is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from peftc.errors import CheckpointError, nearest
from peftc.view.groups import span, unnumbered


@dataclass(frozen=True)
class LoadResult:
    """How a file fitted an adapter. `missing_keys` were left as a new adapter has them, `unexpected_keys` were not used.

    `mismatched_keys`: key, the file's shape, the adapter's. `renamed`: the file's key by the adapter's, where a spelling
    of another version was understood. `casts`: by key, the file's dtype and the adapter's, where they differ.

    Example: model.load_adapter("adapter", "b", strict=False).missing_keys
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
    order = sorted(range(len(keys)), key=lambda i: (unnumbered(keys[i]), i))
    lines: list[str] = []
    for _, group in groupby(order, key=lambda i: unnumbered(keys[i])):
        names = [keys[i] for i in group]
        lines.append(names[0] if len(names) == 1 else f"{span(names)} ({len(names)})")
    return lines
