"""Arguments and options of more than one command."""

from pathlib import Path
from typing import Annotated

import typer

from peftc.choices import Verify

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model's folder, its config.json, or a repository of the Hub; no weights are needed."
    ),
]
Base = Annotated[Path, typer.Argument(metavar="BASE", help="The folder of a transformers model.")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or a repository of the Hub.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")]
ModelFolder = Annotated[Path, typer.Option("--base", help="The folder of its transformers model.")]
ModelClass = Annotated[
    str | None, typer.Option("--class", help="Class of transformers, where the config names none.", metavar="NAME")
]
Verifying = Annotated[
    Verify, typer.Option("--verify", help="Whether ADAPTER's files are whole and of this base, whole, or neither.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsPage = Annotated[
    Path | None, typer.Option("--html", help="Also write a page to look at, which needs no network.", metavar="FILE")
]
