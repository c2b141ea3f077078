"""`merge`, `unmerge`: checkpoints on disk, shard by shard."""

from pathlib import Path
from typing import Annotated

import typer

from peftc.cli.arguments import Adapter, AsJson, ModelClass, NewFolder, Verifying
from peftc.cli.output import tell_written


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The folder of a checkpoint, in safetensors.")],
    adapter: Adapter,
    out: NewFolder,
    undo: Annotated[bool, typer.Option("--undo", help="Write what `unmerge` needs.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Cut ties of weights that are adapted.")] = False,
    verify: Verifying = "all",
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Merge ADAPTER into the checkpoint BASE, without the model in memory.

    Killed at any moment, the same command goes on where it was.
    """
    from peftc.cli.models import structure
    from peftc.stream import merge_checkpoint

    model = None if model_class is None else structure(base, model_class)
    merge_checkpoint(base, adapter, out, undo=undo, untie=untie, verify=verify, model=model)
    tell_written(out, "merged into", as_json, base=str(base), adapter=adapter, undo=undo)


def unmerge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `merge --undo` wrote.")],
    out: NewFolder,
    as_json: AsJson = False,
) -> None:
    """The base that FOLDER was merged from, byte for byte.

    Killed at any moment, the same command goes on where it was.
    """
    from peftc.stream import unmerge_checkpoint

    unmerge_checkpoint(folder, out)
    tell_written(out, "the base is in", as_json, merged=str(folder))
