"""How the examples report: headings, and claims that stop the script if they do not hold."""

import sys

from rich.console import Console

# Without a terminal rich assumes 80 columns, which is too narrow for the tables.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 112)


def heading(title: str) -> None:
    """Print the title of the next part."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def check(holds: bool, claim: str) -> None:
    """Print the claim, or stop if it does not hold."""
    if not holds:
        raise RuntimeError(f"check failed: {claim}")
    console.print(f"[green]✓[/] {claim}")
