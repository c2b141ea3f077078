"""`export`, `verify`: models for runtimes, and whether they are what they should be."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftc.choices import Adapters, Target
from peftc.cli.arguments import Adapter, AsJson, Base, ModelClass, NewFolder
from peftc.cli.output import print_json

if TYPE_CHECKING:
    from peftc.export import Certificate


def export(
    base: Base,
    adapter: Adapter,
    out: NewFolder,
    to: Annotated[Target, typer.Option(help="What to write.")] = "hf",
    adapters: Annotated[Adapters | None, typer.Option(help="What becomes of the adapter.")] = None,
    generation: Annotated[bool, typer.Option("--generation", help="With prefill and decode programs.")] = False,
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Write BASE with ADAPTER for a runtime, and compare what was written with the live model.

    hf: a transformers checkpoint; pt2: a torch.export program; onnx; gguf and mlx: the adapter alone, beside a base.
    """
    from peftc import api
    from peftc.cli.models import with_weights

    compiled = api.load(with_weights(base, model_class), adapter)
    _told(compiled.export(out, to, adapters=adapters, generation=generation), as_json)


def verify(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDERS", help="An export; or a base, an adapter and what was merged.")
    ],
    tolerance: Annotated[float, typer.Option(help="Of the largest value.")] = 1e-4,
    untie: Annotated[bool, typer.Option("--untie", help="The merge cut ties.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check an export again, or a checkpoint that anybody has merged."""
    from peftc.export import verify

    _told(verify(*folders, tolerance=tolerance, untie=untie), as_json)


def _told(certificate: "Certificate", as_json: bool) -> None:
    if as_json:
        print_json(asdict(certificate))
    else:
        typer.echo(str(certificate))
