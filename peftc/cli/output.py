"""What commands print: JSON, and tables that are as wide as their cells."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from peftc.errors import PeftcError

# The exit code of an answer that is no.
NO = 3


def print_json(data: Any) -> None:
    """Print `data` as JSON."""
    typer.echo(json.dumps(data, indent=1, default=str))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their heads. The head row is bold on a terminal; nothing is wrapped or cut, for pipes' sake."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *cells]]
    typer.echo(typer.style(lines[0].rstrip(), bold=True))
    for line in lines[1:]:
        typer.echo(line.rstrip())


def require_new(folder: Path) -> None:
    """Raise PeftcError if there is something in a folder that is to be written, or it is a file."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise PeftcError(f"{folder}: there is something in it already; give a new or an empty folder")


def tell_written(folder: Path, said: str, as_json: bool, **facts: Any) -> None:
    """Say that `folder` is written: in words, or as JSON with `facts` and the files in it."""
    if as_json:
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        print_json({"out": str(folder), **facts, "files": files})
    else:
        typer.echo(f"{said} {folder}")


def write_page(file: Path, page: str) -> None:
    """Write a page, and say so beside what is printed. Raises PeftcError if it can't be written."""
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PeftcError(
            f"{file}: can't be written: {error.strerror}. Give --html a file in a folder that is there"
        ) from None
    typer.echo(f"written to {file}", err=True)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
