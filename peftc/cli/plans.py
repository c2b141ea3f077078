"""`plan`, `diff`, `explain`: what would change, before anything does. None of them reads a weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftc.cli.arguments import AsJson, AsPage, Model, ModelClass
from peftc.cli.output import NO, print_json, write_page
from peftc.errors import PlanError

if TYPE_CHECKING:
    from peftc.plan import Plan

METHOD = "LORA"


def plan(
    model: Model,
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC", help="adapter_config.json, its folder, or YAML.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="Modules, as q_proj,v_proj; or all-linear.")] = None,
    r: Annotated[int | None, typer.Option(help="The rank.")] = None,
    method: Annotated[str | None, typer.Option(help=f"The method, where no SPEC says it (default {METHOD}).")] = None,
    field: Annotated[list[str] | None, typer.Option(help="Any field, as name=value; repeatable.")] = None,
    model_class: ModelClass = None,
    as_json: AsJson = False,
    html: AsPage = None,
) -> None:
    """What compiling MODEL with SPEC would change.

    Options take the place of fields of SPEC, or make one. Exit code 3 if something is missed or in conflict.
    """
    from peftc import api
    from peftc.cli.models import structure
    from peftc.cli.specs import spec_of

    default = METHOD if spec is None else None
    wanted = spec_of(spec, method or default, targets, r, field or ())
    described = structure(model, model_class)
    made = api.plan(described, wanted)
    typer.echo(made.to_json() if as_json else str(made))
    if html is not None:
        write_page(html, made.to_html(model=described))
    if made.conflicts or any(miss.error for miss in made.misses):
        raise typer.Exit(NO)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan's JSON, or an adapter's folder or config.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
    html: AsPage = None,
) -> None:
    """How two plans differ, or the configs of two adapters: + only in B, - only in A, ~ otherwise in B.

    --html has two plans side by side.
    """
    from peftc.plan import Plan

    ours, theirs = _read(a), _read(b)
    if isinstance(ours, Plan) and isinstance(theirs, Plan):
        lines = ours.diff(theirs).splitlines()
    elif isinstance(ours, Plan) or isinstance(theirs, Plan):
        raise PlanError(f"{a} and {b}: one is a plan and the other is not; give two of a kind")
    else:
        lines = _fields_apart(ours, theirs)
    if html is not None and not isinstance(ours, Plan):
        raise PlanError(f"--html {html}: there is a page of two plans only; peftc plan MODEL {a} --json makes one")
    if as_json:
        print_json({"equal": not lines, "differences": lines})
    else:
        typer.echo("\n".join(lines) if lines else "equal")
    if html is not None and isinstance(ours, Plan) and isinstance(theirs, Plan):
        write_page(html, ours.to_html(theirs))


def explain(
    model: Model,
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="adapter_config.json, its folder, or YAML.")],
    fqn: Annotated[str, typer.Argument(metavar="FQN", help="The full name of a module or parameter.")],
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """What SPEC does at a module of MODEL, or why it does nothing there."""
    from peftc import api
    from peftc.cli.models import structure

    compiled = api.compile(structure(model, model_class), api.load_spec(spec), on_unmatched="warn")
    told = compiled.explain(fqn)
    if as_json:
        print_json({"fqn": fqn, "lines": told.splitlines()})
    else:
        typer.echo(told)


def _read(path: Path) -> "Plan | Mapping[str, Any]":
    """A plan, or the fields of an adapter's config."""
    from peftc import api
    from peftc.plan import Plan

    try:
        text = "" if path.is_dir() else path.read_text(encoding="utf-8")
        data: Any = json.loads(text) if text.lstrip().startswith("{") else None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: can't be read: {error}") from None
    return Plan.from_json(text) if isinstance(data, dict) and "edits" in data else api.load_spec(path).to_dict()


def _fields_apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    lines = [f"- {name}: {ours[name]!r}" for name in ours if name not in theirs]
    lines += [f"+ {name}: {theirs[name]!r}" for name in theirs if name not in ours]
    both = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    return [*lines, *(f"~ {name}: {ours[name]!r} → {theirs[name]!r}" for name in both)]
