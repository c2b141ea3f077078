"""The plan as a table: equal layers in one row, then costs, ties, and everything that needs a reader's eye."""

import io
import re
import shutil
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftc.edits import Edit, Planned


def render(plan: Planned, width: int | None = None) -> str:
    """The plan as text of at most `width` columns (default: the terminal's, at least 100)."""
    width = width or max(100, shutil.get_terminal_size((120, 24)).columns)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, highlight=False)
    console.print(Text(_title(plan), style="bold"), soft_wrap=True)
    if plan.edits:
        console.print(_table(plan))
    for label, lines in _sections(plan):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, min_width=10)
        grid.add_column(overflow="fold")
        for position, line in enumerate(lines):
            grid.add_row(Text(label if position == 0 else ""), Text(line))
        console.print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))


def _title(plan: Planned) -> str:
    sites = len({edit.site for edit in plan.edits})
    adapters = ", ".join(f"{name} ({spec.peft_type})" for name, spec in plan.adapters.items())
    return (
        f"Plan for {plan.model}: {_count(len(plan.edits), 'edit')} on {_count(sites, 'site')}, adapter {adapters},"
        f" capture={plan.capture}, fingerprint {plan.fingerprint}"
    )


def _table(plan: Planned) -> Table:
    several = len(plan.adapters) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("site", overflow="fold", min_width=22)
    table.add_column("×", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("in → out", no_wrap=True)
    if several:
        table.add_column("adapter", overflow="fold")
    table.add_column("insert", no_wrap=True)
    for column in _columns(plan):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    table.add_column("trained", justify="right", no_wrap=True)
    around = ""
    for pattern, edits in _groups(plan):
        stem, name = _stem(pattern)
        if stem != around:
            table.add_row(Text(stem))
            around = stem
        cells = [f"  {name}" if stem else name or "(the model)", *_cells(plan, edits, several)]
        table.add_row(*map(Text, cells))
    return table


def _stem(pattern: str) -> tuple[str, str]:
    """`model.layers.{0–79}`, `self_attn.q_proj`: the path to the numbered layer, and the name in it."""
    parts = pattern.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.startswith("{") or _is_number(part)]
    cut = numbered[-1] + 1 if numbered else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _cells(plan: Planned, edits: Sequence[Edit], several: bool) -> list[str]:
    edit = edits[0]
    site = plan.sites[edit.site]
    return [
        str(len(edits)),
        f"{site.op}*" if edit.opaque else site.op,
        _sizes(site),
        *([edit.adapter] if several else []),
        f"{edit.rule.name} @{'+'.join(edit.slots)}" if not edit.whole else "trained copy",
        *(_number(edit.constants.get(edit.rule.columns.get(column, ""))) for column in _columns(plan)),
        _params(edit),
        f"{sum(p.numel for e in edits if not e.follows for p in e.params if p.trainable):,}",
    ]


def _sizes(site: Any) -> str:
    """`in → out` of a site with a weight."""
    return f"{site.in_features} → {site.out_features}" if getattr(site, "in_features", 0) else "–"


def _columns(plan: Planned) -> list[str]:
    """What the rules of the plan want shown of their edits."""
    return list(dict.fromkeys(column for edit in plan.edits for column in edit.rule.columns))


def _params(edit: Edit) -> str:
    shown = [f"{param.name} {'×'.join(map(str, param.shape))}" for param in edit.params[:4]]
    if len(edit.params) > 4:
        shown.append(f"and {len(edit.params) - 4} more")
    dropouts = [f"{name} p={p}" for name, p in edit.dropouts.items() if p > 0]
    text = ", ".join(shown + dropouts)
    return text if len(text) <= 40 else ",\n".join(shown + dropouts)


def _groups(plan: Planned) -> list[tuple[str, list[Edit]]]:
    """Edits that differ only in the numbers of their fqn, in order of first appearance."""
    groups: dict[object, list[Edit]] = {}
    for edit in plan.edits:
        site = plan.sites[edit.site]
        key = (
            re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", edit.site),
            (site.op, _sizes(site), site.module),
            (edit.adapter, edit.rule, edit.slots, edit.params, edit.opaque),
            tuple(edit.constants.items()),
            tuple(edit.dropouts.items()),
        )
        groups.setdefault(key, []).append(edit)
    return [(span([edit.site for edit in edits]), edits) for edits in groups.values()]


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


_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")


def _sections(plan: Planned) -> list[tuple[str, list[str]]]:
    costs = plan.costs
    share = costs.trainable / costs.total if costs.total else 0
    sections = [
        ("", [""]),
        ("trainable", [f"{costs.trainable:,} of {costs.total:,} parameters ({share:.4%}), added in {_dtypes(plan)}"]),
        (
            "memory",
            [
                f"weights {_bytes(costs.weight_bytes)} · gradients {_bytes(costs.gradient_bytes)}"
                f" · Adam states {_bytes(costs.adam_bytes)}"
            ],
        ),
        ("compute", _compute(plan)),
        ("virtual", _added(plan)),
        ("biases", _biases(plan)),
        ("ties", [" = ".join(group) for group in plan.ties]),
        ("caution", list(plan.cautions)),
        ("conflict", [f"{conflict.site or 'model'}: {conflict.reason}" for conflict in plan.conflicts]),
        ("✗ missed", [str(miss) for miss in plan.misses if miss.error]),
        ("passed by", [str(miss) for miss in plan.misses if not miss.error]),
    ]
    if any(edit.opaque for edit in plan.edits):
        sections.append(("*", ["called as it is: torch.fx can't trace its forward"]))
    return [(label, lines) for label, lines in sections if lines]


def _compute(plan: Planned) -> list[str]:
    flops = plan.costs.flops_per_token
    return [f"+{_scaled(flops, 1000, _FLOPS)} per {_unit(plan)} (forward)"] if flops or not plan.edits else []


def _unit(plan: Planned) -> str:
    """What the FLOPs are counted per: a convolution has output positions where others have tokens."""
    convolutions = any(site.op.startswith("conv") for site in plan.sites.values())
    return "token or output position" if convolutions else "token"


def _dtypes(plan: Planned) -> str:
    return ", ".join(dict.fromkeys(param.dtype for edit in plan.edits for param in edit.params)) or "no dtype"


def _added(plan: Planned) -> list[str]:
    """What edits add beside operands of ops, in the words of their rules."""
    return [line for edit in plan.edits for line in edit.rule.summary(edit.adapter, edit.constants, edit.slots)]


def _biases(plan: Planned) -> list[str]:
    if not plan.trained:
        return []
    numel = sum(prod(tensor.shape) for tensor in plan.trained)
    return [f"{len(plan.trained)} of the base model trained on copies ({numel:,} parameters)"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _bytes(number: int) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: int, step: int, units: Sequence[str]) -> str:
    value, unit = float(number), 0
    while value >= step and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{value:.4g} {units[unit]}"
