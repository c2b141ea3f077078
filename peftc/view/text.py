"""The plan as a table: equal layers in one row, then costs, ties, and everything that needs a reader's eye."""

import io
import shutil
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftc.edits import Edit, Planned
from peftc.view.groups import groups, stem
from peftc.view.tree import of_edit
from peftc.view.words import (
    added,
    column,
    columns,
    flops,
    flops_unit,
    in_bytes,
    inserted,
    notes,
    shape,
    share,
    sizes,
    title,
)


def render(plan: Planned, width: int | None = None) -> str:
    """The plan as text of at most `width` columns (default: the terminal's, at least 100)."""
    width = width or max(100, shutil.get_terminal_size((120, 24)).columns)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, highlight=False)
    console.print(Text(title(plan), style="bold"), soft_wrap=True)
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
    for name in columns(plan):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    table.add_column("trained", justify="right", no_wrap=True)
    around = ""
    for pattern, edits in groups(plan):
        path, name = stem(pattern)
        if path != around:
            table.add_row(Text(path))
            around = path
        cells = [f"  {name}" if path else name or "(the model)", *_cells(plan, edits, several)]
        table.add_row(*map(Text, cells))
    return table


def _cells(plan: Planned, edits: Sequence[Edit], several: bool) -> list[str]:
    edit = edits[0]
    site = plan.sites[edit.site]
    return [
        str(len(edits)),
        f"{site.op}*" if edit.opaque else site.op,
        sizes(site),
        *([edit.adapter] if several else []),
        inserted(edit),
        *(column(edit, name) for name in columns(plan)),
        _params(edit),
        f"{sum(of_edit(edit).trained for edit in edits):,}",
    ]


def _params(edit: Edit) -> str:
    shown = [f"{param.name} {shape(param.shape)}" for param in edit.params[:4]]
    if len(edit.params) > 4:
        shown.append(f"and {len(edit.params) - 4} more")
    dropouts = [f"{name} p={p}" for name, p in edit.dropouts.items() if p > 0]
    text = ", ".join(shown + dropouts)
    return text if len(text) <= 40 else ",\n".join(shown + dropouts)


def _sections(plan: Planned) -> list[tuple[str, list[str]]]:
    costs = plan.costs
    memory = (
        f"weights {in_bytes(costs.weight_bytes)} · gradients {in_bytes(costs.gradient_bytes)}"
        f" · Adam states {in_bytes(costs.adam_bytes)}"
    )
    trainable = f"{costs.trainable:,} of {costs.total:,} parameters ({share(plan):.4%}), {added(plan)}"
    sections = [("", [""]), ("trainable", [trainable]), ("memory", [memory])]
    if costs.flops_per_token or not plan.edits:
        sections.append(("compute", [f"+{flops(costs.flops_per_token)} per {flops_unit(plan)} (forward)"]))
    sections += [("✗ missed" if label == "missed" else label, lines) for label, lines in notes(plan)]
    if any(edit.opaque for edit in plan.edits):
        sections.append(("*", ["called as it is: torch.fx can't trace its forward"]))
    return sections
