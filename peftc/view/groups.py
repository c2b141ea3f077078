"""What is equal but for the numbers in its name: layers in a row of a table, in a branch of a tree."""

import re
from collections.abc import Hashable, Iterable, Sequence
from math import prod
from sys import maxsize

from peftc.edits import Edit, Planned
from peftc.view.words import sizes


def alike(plan: Planned, edit: Edit) -> Hashable:
    """What edits that are shown as one have in common: all but the site's name."""
    site = plan.sites[edit.site]
    return (
        (site.op, sizes(site), site.module),
        (edit.adapter, edit.rule, edit.slots, edit.params, edit.opaque),
        tuple(edit.constants.items()),
        tuple(edit.dropouts.items()),
    )


def groups(plan: Planned) -> list[tuple[str, list[Edit]]]:
    """Edits that differ only in the numbers of their fqn, in order of first appearance, by the `span` of their sites."""
    found: dict[object, list[Edit]] = {}
    for edit in plan.edits:
        found.setdefault((unnumbered(edit.site), alike(plan, edit)), []).append(edit)
    return [(span([edit.site for edit in edits]), edits) for edits in found.values()]


def unnumbered(name: str) -> str:
    """`layers.#.q_proj`: a name without its numbers."""
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", name)


def span(names: Sequence[str]) -> str:
    """`layers.{0–79}.q_proj` for names that differ in numbers only; `{…}` where they are no product of ranges."""
    split = [name.split(".") for name in names]
    columns = [list(dict.fromkeys(parts)) for parts in zip(*split, strict=True)]
    full = prod(len(column) for column in columns) == len(names)
    return ".".join(
        column[0] if len(column) == 1 else "{" + (ranges(int(number) for number in column) if full else "…") + "}"
        for column in columns
    )


def ranges(numbers: Iterable[int]) -> str:
    """`0–3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def stem(pattern: str) -> tuple[str, str]:
    """`model.layers.{0–79}`, `self_attn.q_proj`: the path to the last numbered layer, and the name in it."""
    parts = pattern.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.startswith("{") or is_number(part)]
    cut = numbered[-1] + 1 if numbered else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def layer_of(fqn: str) -> tuple[str, int | None, str]:
    """`model.layers`, 17, `self_attn.q_proj`: where the first number is; of an fqn without one, all is the name."""
    parts = fqn.split(".")
    at = next((at for at, part in enumerate(parts) if is_number(part)), None)
    return ("", None, fqn) if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def natural(fqn: str) -> list[tuple[int, str]]:
    """What sorts names as people count: `layers.2` comes before `layers.10`, and numbers before words."""
    return [(int(part), "") if is_number(part) else (maxsize, part) for part in fqn.split(".")]


def is_number(part: str) -> bool:
    """Whether a part of an fqn is a number."""
    return part.isascii() and part.isdigit()
