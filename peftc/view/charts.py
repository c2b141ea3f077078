"""What each layer adds, as bars: one for a layer and plan, for every measure, and the same as rows of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from peftc.edits import Planned
from peftc.view.groups import ranges
from peftc.view.tree import Amounts, layers

SLOT, TALL = 10, 100


@dataclass(frozen=True)
class Bars:
    """One measure: which (as in `Amounts`), the smallest and the largest amount, and for each plan an SVG path."""

    measure: str
    least: int
    most: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class LayerChart:
    """The numbered layers in `path`; `rows` has equal neighbours as one: their numbers, and what each plan adds in each."""

    path: str
    numbers: str
    count: int
    bars: tuple[Bars, ...]
    rows: tuple[tuple[str, tuple[Amounts, ...]], ...]


def layer_charts(plans: Sequence[Planned]) -> list[LayerChart]:
    """A chart for every list of layers that `plans` do something in."""
    found = [layers(plan) for plan in plans]
    paths = dict.fromkeys(path for own in found for path in own)
    return [_chart(path, [own.get(path, {}) for own in found]) for path in paths]


def _chart(path: str, found: Sequence[Mapping[int, Amounts]]) -> LayerChart:
    numbers = range(max(number for own in found for number in own) + 1)
    each = [tuple(own.get(number, Amounts()) for own in found) for number in numbers]
    rows = tuple(
        (ranges(number for number, _ in equal), amounts)
        for amounts, equal in ((key, [*group]) for key, group in groupby(enumerate(each), key=lambda pair: pair[1]))
    )
    bars = tuple(_bars(measure, [[getattr(own, measure) for own in plan] for plan in zip(*each, strict=True)])
                 for measure in Amounts._fields)  # fmt: skip
    return LayerChart(path, ranges(numbers), len(numbers), bars, rows)


def _bars(measure: str, series: Sequence[Sequence[int]]) -> Bars:
    values = [value for own in series for value in own]
    most, width = max(values), (SLOT - 2) / len(series)
    paths = tuple(
        "".join(
            f"M{number * SLOT + 1 + at * width:g} {TALL}v-{TALL * value / most:.3g}h{width:g}V{TALL}z"
            for number, value in enumerate(own)
            if value
        )
        for at, own in enumerate(series)
    )
    return Bars(measure, min(values), most, paths)
