"""A trained adapter as one HTML page: how much it changes each weight, and the spectrum of every change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from peftc.view.groups import layer_of
from peftc.view.page import rendered

# How many steps of colour there are.
STEPS = 9


@dataclass(frozen=True)
class Change:
    """What an adapter changes a weight by: the Frobenius norm, the effective rank and the singular values of that; none
    where it is no product, or the files don't tell. `facts`: what else is known, by name.
    """

    name: str
    norm: float | None = None
    effective_rank: float | None = None
    spectrum: tuple[float, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class Cell:
    """A change in a map: its number among all, and the step of its colour."""

    number: int
    change: Change
    step: int


@dataclass(frozen=True)
class Heat:
    """The layers in `path` × the modules in a layer."""

    path: str
    modules: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def adapter_page(
    title: str,
    facts: Sequence[tuple[str, str]],
    wrong: Mapping[str, str | None],
    changes: Sequence[Change],
    others: Iterable[str],
) -> str:
    """A page of the adapter `title`. `facts`: lines of its head; `wrong`: what is wrong with it, if something is, by a word
    for that; `others`: what else its files hold.
    """
    told = [(change, change.norm) for change in changes if change.norm is not None and isfinite(change.norm)]
    norms = [norm for _, norm in told]
    spectra = [
        [change.name, _few(change.norm), _few(change.effective_rank), [_few(value) for value in change.spectrum]]
        for change, _ in told
    ]
    return rendered(
        "adapter.html",
        plans=(),
        title=title,
        facts=facts,
        wrong={label: told for label, told in wrong.items() if told is not None},
        changes=changes,
        others=[*others],
        maps=_maps(told, max(norms, default=0.0)),
        most=max(norms, default=None),
        least=min(norms, default=None),
        spectra=spectra,
        steps=STEPS,
        columns=list(dict.fromkeys(name for change in changes for name in change.facts)),
    )


def _maps(told: Sequence[tuple[Change, float]], most: float) -> list[Heat]:
    """By the path before the first number; what has no number comes last, in one row."""
    found: dict[str, dict[str, dict[str, Cell]]] = {}
    for number, (change, norm) in enumerate(told):
        path, layer, module = layer_of(change.name)
        step = min(STEPS - 1, int(STEPS * norm / most)) if most else 0
        row = "" if layer is None else str(layer)
        found.setdefault(path, {}).setdefault(row, {})[module] = Cell(number, change, step)
    return [_map(path, found[path]) for path in sorted(found, key=bool, reverse=True)]


def _map(path: str, rows: Mapping[str, Mapping[str, Cell]]) -> Heat:
    modules = tuple(dict.fromkeys(module for row in rows.values() for module in row))
    order = sorted(rows, key=lambda row: int(row or 0))
    return Heat(path, modules, tuple((row, tuple(rows[row].get(module) for module in modules)) for row in order))


def _few(value: float | None) -> float | None:
    """Four digits of it."""
    return None if value is None else float(f"{value:.4g}")
