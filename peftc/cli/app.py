"""The application: its commands by name, and what becomes of errors and warnings."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftc.cli import adapters, artefacts, checkpoints, demo, methods, plans
from peftc.errors import PeftcError

_ABOUT = """Plan, inspect, merge, convert and export adapters (PEFT's files).

Exit codes: 0 it is done; 1 an error, told on stderr, with nothing changed; 2 the command line itself is wrong;
3 the answer is no: a plan with misses or conflicts, a runtime asked for that does not take the adapter, a base that is
not the adapter's; 130 interrupted (Ctrl-C): nothing is half done.
"""
INTERRUPTED = 130
_RESUMES = "interrupted: nothing is half done. The same command goes on where it was; to give up, delete the new folder"
_STARTS_OVER = "interrupted: nothing is half done. Run the same command to start over"
# Each with an example of its own help, which the tests run.
_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("plan", plans.plan, "peftc plan model/config.json --targets q_proj,v_proj --r 8"),
    ("diff", plans.diff, "peftc diff plan-a.json plan-b.json"),
    ("explain", plans.explain, "peftc explain model adapter lm_head"),
    ("inspect", adapters.inspect, "peftc inspect adapter"),
    ("preflight", adapters.preflight, "peftc preflight adapter --runtime vllm"),
    ("convert", adapters.convert, "peftc convert adapter served --base model --form serving"),
    ("combine", adapters.combine, "peftc combine adapter other mix --base model --weights 0.7,-0.3 --type cat"),
    ("merge", checkpoints.merge, "peftc merge model adapter merged --undo"),
    ("unmerge", checkpoints.unmerge, "peftc unmerge merged restored"),
    ("export", artefacts.export, "peftc export model adapter exported --to hf"),
    ("verify", artefacts.verify, "peftc verify model adapter merged"),
    ("rules", methods.rules, "peftc rules"),
    ("demo", demo.demo, "peftc demo --show 2"),
)


class _Group(TyperGroup):
    """Tells errors of peftc's own in one message, and warnings in a line each, on stderr."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            try:
                return super().invoke(ctx)
            except PeftcError as error:
                typer.echo(f"{type(error).__name__}: {error}", err=True)
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                typer.echo(_RESUMES if ctx.invoked_subcommand in ("merge", "unmerge") else _STARTS_OVER, err=True)
                raise typer.Exit(INTERRUPTED) from None


def _warned(message: Warning | str, *_: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _shown_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peftc {version('peftc')}")
        raise typer.Exit


def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell on stderr what is done.")] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Bars, on a terminal.")] = True,
    _: Annotated[
        bool, typer.Option("--version", callback=_shown_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every command does."""
    if verbose:
        handler, logger = logging.StreamHandler(), logging.getLogger("peftc")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if not progress:
        from peftc.progress import VARIABLE

        os.environ[VARIABLE] = "0"


def _made() -> typer.Typer:
    made = typer.Typer(
        cls=_Group,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    made.callback(help=_ABOUT)(_options)
    for name, function, example in _COMMANDS:
        made.command(name, epilog=f"Example: {example}")(function)
    return made


app = _made()
main = partial(app, prog_name="peftc")
