"""The page and the plots of `benchmarks/bars.py`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
_STEP = re.compile(r"step, float32, 2 × (?P<tokens>\d+), r=(?P<r>\d+), width (?P<width>\d+)")
COLOURS = {"peft": "#b8702c", "peftc": "#2a6fb0", "floor": "#8a8a8a"}

TEXT = """# What adapters cost

`python benchmarks/bars.py` makes this page: every measure with a bar, each beside the bare model, peft 0.21.2 and the floor
in the same run. CPU seconds of one thread of a shared two-core server, medians of ratios within a round, the quartiles in
brackets. The floor is what the adapters' own products take beside the bare model; of decoding and of mixed batches the base
with the same products by hand (16 adapters as one stack for each factor); of what is kept for the backward pass the least
that can be; of merging one copy of the weights, and the figures are copies. More figures, and how each is measured, are in
[the figures](benchmarks.md).

![To the bare model: peft, peftc and the floor](pictures/speed.png)

![A training step: what adapters add, in their own products](pictures/steps.png)

{met} of {count} bars are met. [Where the time goes](where.md) profiles those that are not. Steps of 512 tokens and in
bfloat16, forwards, decoding one token and what is kept are of the last run, after changes there; the others of runs of the
day before. A step's models are made anew five times: where tensors lie decides up to a fifth of what adapters add, for all
rounds of a process (one cell gave 1.17 to 1.47 in six). Those of 2,048 tokens are of one process each, which does not
settle a cell. 16 rows with 16 adapters took 1.39 and 1.43 at width 576, 1.08 and 1.18 at width 2048 in two runs; a forward
1.57, 0.92 and 0.79 of the products in three, of which the last stands here.

| measure | bare | peft | peftc | floor | for the bar | bar |
|---|---:|---:|---:|---:|---:|---:|
{rows}

*For the bar*: products are what a step takes more than bare as a multiple of the adapters' own products, or as a share
of what peft takes more; else it is the column of peftc.
"""


def draw(figures: Figures, page: Path, plots: Path) -> None:
    """Write the page and the plots. Raises SystemExit if matplotlib is not there."""
    page.write_text(text(figures))
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('The plots need matplotlib: pip install "peftc[bench]"') from None

    matplotlib.use("Agg")
    _to_bare(figures, plots / "speed.png")
    _in_products(figures, plots / "steps.png")


def text(figures: Figures) -> str:
    """The page."""
    met = sum(_is_met(one) for one in figures.values())
    rows = "\n".join(_row(name, one) for name, one in figures.items())
    return TEXT.format(met=met, count=len(figures), rows=rows)


def _is_met(one: Mapping[str, Any]) -> bool:
    return round(one["value"], 2) <= one["bar"]


def _row(name: str, one: Mapping[str, Any]) -> str:
    counted = one["rounds"] == 1
    bare = "" if counted else f"{1000 * one['bare']:.1f} ms"
    cells = [_ratio(one[kind], counted) for kind in ("peft", "peftc", "floor")]
    value = f"{one['value']:.2f} {one['unit']}"
    met = "" if _is_met(one) else ", missed"
    return f"| {name} | {bare} | {' | '.join(cells)} | {value} | {one['bar']:g}{met} |"


def _ratio(quartiles: Sequence[float] | None, counted: bool) -> str:
    if quartiles is None:
        return ""
    low, middle, high = quartiles
    return f"{middle:.2f}" if counted else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _to_bare(figures: Figures, file: Path) -> None:
    """For each measure of time the ratios to bare, with their quartiles."""
    from matplotlib import pyplot

    own = {
        name: one
        for name, one in figures.items()
        if one["unit"] != "copies" and one["rounds"] > 1 and (not _STEP.match(name) or "r=16, width 576" in name)
    }
    figure, axes = pyplot.subplots(figsize=(9, 0.52 * len(own) + 1.3), dpi=110)
    for y, one in enumerate(own.values()):
        for offset, kind in ((-0.2, "peft"), (0.0, "peftc"), (0.2, "floor")):
            if one[kind] is None:
                continue
            low, middle, high = one[kind]
            axes.plot([low, high], [y + offset] * 2, color=COLOURS[kind], linewidth=2, alpha=0.5)
            axes.plot(middle, y + offset, "o", color=COLOURS[kind], markersize=6, label=kind if y == 0 else None)
    axes.set_yticks(range(len(own)), list(own))
    axes.invert_yaxis()
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set(xlabel="time, as a multiple of the bare model's", xlim=(0.9, None))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _in_products(figures: Figures, file: Path) -> None:
    """What a step in float32 takes more than bare as a multiple of the products, over tokens: by rank and width."""
    from matplotlib import pyplot

    found = {name: (match, one) for name, one in figures.items() if (match := _STEP.match(name))}
    widths = sorted({int(match["width"]) for match, _ in found.values()})
    ranks = sorted({int(match["r"]) for match, _ in found.values()})
    figure, panels = pyplot.subplots(1, len(widths), figsize=(9, 3.8), dpi=110, sharey=True, squeeze=False)
    for axes, width in zip(panels[0], widths, strict=True):
        for r, shade in zip(ranks, (0.45, 0.7, 1.0), strict=False):
            rows = [
                (2 * int(match["tokens"]), one)
                for match, one in found.values()
                if int(match["r"]) == r and int(match["width"]) == width
            ]
            tokens = [count for count, _ in rows]
            for kind in ("peft", "peftc"):
                # Of medians, as the plot has no room for more.
                over = [(one[kind][1] - 1) / (one["floor"][1] - 1) for _, one in rows]
                axes.plot(tokens, over, "o-", color=COLOURS[kind], alpha=shade, label=f"{kind}, r={r}")
        axes.axhline(1.3, color="0.4", linewidth=1, linestyle="--")
        axes.set(title=f"width {width}", xscale="log", xlabel="tokens in a step", ylim=(0, None))
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("added time / the products' own")
    panels[0][-1].legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
