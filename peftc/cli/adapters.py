"""`inspect`, `preflight`, `convert`: an adapter's files."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peftc import api, export
from peftc.checkpoint import Form, locate
from peftc.cli.inspection import Inspected, inspected
from peftc.cli.models import ModelClass, structure, with_weights
from peftc.cli.output import NO, AsJson, AsPage, print_json, print_table, write_page
from peftc.view.heat import Change, adapter_page
from peftc.view.words import shape

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder, or a repository of the Hub.")]


def inspect(
    adapter: Adapter,
    base: Annotated[
        Path | None, typer.Option(help="Its model's folder or config.json, where files don't tell.")
    ] = None,
    model_class: ModelClass = None,
    as_json: AsJson = False,
    html: AsPage = None,
) -> None:
    """What an adapter's files hold, whether they are whole, and how much they change at each site.

    norm: the Frobenius norm of the change; effective rank: the exponential of the entropy of its singular values
    (Roy & Vetterli 2007). Both for methods whose change is a product. Exit code 1 if the files are damaged. --html has the
    norms as a heat map over layers and modules, and the singular values of the change that one chooses there.
    """
    found = inspected(locate(adapter), None if base is None else structure(base, model_class))
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)
    if html is not None:
        write_page(html, _page(found))
    if found.damage is not None:
        raise typer.Exit(1)


def preflight(
    adapter: Adapter,
    runtime: Annotated[str | None, typer.Option(help="One of them; exit code 3 if it does not take it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which runtimes take an adapter as its files are, why not, and what to do instead."""
    verdicts = export.preflight(adapter, runtime)
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    else:
        typer.echo("\n".join(map(str, verdicts)))
    if runtime is not None and not all(verdict.takes for verdict in verdicts):
        raise typer.Exit(NO)


def convert(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder.")],
    base: Annotated[Path, typer.Option(help="The folder of its transformers model.")],
    form: Annotated[Form, typer.Option(help="The form of the files.")] = "serving",
    model_class: ModelClass = None,
) -> None:
    """Write an adapter in another form, with equal outputs: one rank and scaling 1, as servers take it, say."""
    compiled = api.load(with_weights(base, model_class), adapter)
    compiled.save_pretrained(out, form=form)
    typer.echo(f"written to {out}")


def _show(found: Inspected) -> None:
    typer.echo(f"{found.folder}: {found.method}, {found.parameters:,} parameters, {found.bytes:,} bytes")
    typer.echo(f"base       {found.base or 'not said'}")
    typer.echo(f"integrity  {found.damage or found.integrity}")
    columns = list(dict.fromkeys(name for site in found.sites for name in site.columns))
    rows = [
        (site.name, *map(site.columns.get, columns), f"{site.parameters:,}", site.norm, site.effective_rank)
        for site in found.sites
    ]
    if rows:
        print_table(("site", *columns, "parameters", "norm", "effective rank"), rows)
    for name, sizes in found.others.items():
        typer.echo(f"beside     {name} {shape(sizes)}")


def _page(found: Inspected) -> str:
    facts = [
        ("method", found.method),
        ("parameters", f"{found.parameters:,}"),
        ("bytes", f"{found.bytes:,}"),
        ("base", found.base or "not said"),
        ("integrity", found.integrity),
    ]
    changes = [
        Change(
            name=site.name,
            norm=site.norm,
            effective_rank=site.effective_rank,
            spectrum=site.spectrum or (),
            facts={**site.columns, "parameters": site.parameters},
        )
        for site in found.sites
    ]
    others = [f"{name} {shape(sizes)}" for name, sizes in found.others.items()]
    return adapter_page(found.folder, facts, found.damage, changes, others)
