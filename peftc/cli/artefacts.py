"""`export`, `verify`: models for runtimes, and whether they are what they should be."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftc.choices import Adapters, Sizes, Target
from peftc.cli.arguments import Adapter, AsJson, Base, ModelClass, NewFolder, Verifying
from peftc.cli.output import print_json, require_new

if TYPE_CHECKING:
    from peftc.export import Certificate


def export(
    base: Base,
    adapter: Adapter,
    out: NewFolder,
    to: Annotated[Target, typer.Option(help="What to write.")] = "hf",
    adapters: Annotated[Adapters | None, typer.Option(help="What becomes of the adapter.")] = None,
    generation: Annotated[
        bool, typer.Option("--generation", help="With generate.py, which needs no model code.")
    ] = False,
    gguf: Annotated[
        Path | None, typer.Option(help="The base as GGUF, to have its changed tensors written anew.")
    ] = None,
    quantized: Annotated[bool, typer.Option("--quantized", help="In their own types, not float16.")] = False,
    sizes: Annotated[Sizes, typer.Option(help="Of inputs: any, or those alone that it is made with.")] = "open",
    verify: Verifying = "all",
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Write BASE with ADAPTER for a runtime, and compare what was written with the live model.

    hf: a transformers checkpoint; pt2: a torch.export program; onnx; aoti: a compiled program; gguf and mlx: the adapter
    alone, beside a base, or with --adapters merged --gguf FILE the whole.
    """
    from peftc import api
    from peftc.cli.models import tokenizer_in, with_weights

    require_new(out)
    compiled = api.load(with_weights(base, model_class), adapter, verify=verify)
    tokenizer = tokenizer_in(base) if generation else None
    more: dict[str, Any] = {"generation": generation, "tokenizer": tokenizer, "gguf": gguf, "quantized": quantized}
    _told(compiled.export(out, to, adapters=adapters, sizes=sizes, **more), as_json)


def verify(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDERS", help="An export; an adapter; or a base, an adapter and what was merged."),
    ],
    tolerance: Annotated[float, typer.Option(help="Of the largest value.")] = 1e-4,
    untie: Annotated[bool, typer.Option("--untie", help="The merge cut ties.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check an export again, a checkpoint that anybody has merged, or whether an adapter's files are what was saved."""
    from peftc.export import verify
    from peftc.specs.io import CONFIG_NAME

    if len(folders) == 1 and (folders[0] / CONFIG_NAME).is_file():
        _tell_files(folders[0], as_json)
        return
    _told(verify(*folders, tolerance=tolerance, untie=untie), as_json)


def _tell_files(folder: Path, as_json: bool) -> None:
    from peftc.cli.inspection import WHOLE, require_whole

    require_whole(folder)
    if as_json:
        print_json({"adapter": str(folder), "integrity": WHOLE})
    else:
        typer.echo(f"{folder}: {WHOLE}")


def _told(certificate: "Certificate", as_json: bool) -> None:
    if as_json:
        print_json(asdict(certificate))
    else:
        typer.echo(str(certificate))
