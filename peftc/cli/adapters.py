"""`inspect`, `preflight`, `convert`, `combine`: adapters' files."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peftc.choices import Dtype, Form
from peftc.cli.arguments import Adapter, AsJson, AsPage, ModelClass, ModelFolder, NewFolder, Verifying
from peftc.cli.output import NO, print_json, print_table, require_new, tell_written, write_page

if TYPE_CHECKING:
    from peftc.cli.inspection import Inspected


def inspect(
    adapter: Adapter,
    base: Annotated[
        Path | None,
        typer.Option(help="Its model's folder, whose weights are compared with those it was saved with; or a config."),
    ] = None,
    model_class: ModelClass = None,
    as_json: AsJson = False,
    html: AsPage = None,
) -> None:
    """What an adapter's files hold, whether they are whole, and how much they change at each site.

    norm: the Frobenius norm of the change; effective rank: the exponential of the entropy of its singular values
    (Roy & Vetterli 2007). Both for methods whose change is a product. Exit code 1 if the files are damaged, 3 if --base has
    other weights than those they were saved with. --html has the norms as a heat map over layers and modules, and the
    singular values of the change that one chooses there.
    """
    from peftc.checkpoint import locate
    from peftc.cli.inspection import inspected
    from peftc.cli.models import structure

    model = None if base is None else structure(base, model_class)
    weights = None if base is None or not any(base.glob("*.safetensors")) else base
    found = inspected(locate(adapter), model, weights)
    if as_json:
        print_json(asdict(found))
    found = _in_order(found)
    if not as_json:
        _show(found)
    if html is not None:
        write_page(html, _page(found))
    if found.damage is not None:
        raise typer.Exit(1)
    if found.misfit is not None:
        raise typer.Exit(NO)


def preflight(
    adapter: Adapter,
    runtime: Annotated[str | None, typer.Option(help="One of them; exit code 3 if it does not take it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which runtimes take an adapter as its files are, why not, and what to do instead."""
    from peftc import export

    verdicts = export.preflight(adapter, runtime)
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    else:
        typer.echo("\n".join(map(str, verdicts)))
    if runtime is not None and not all(verdict.takes for verdict in verdicts):
        raise typer.Exit(NO)


def convert(
    adapter: Adapter,
    out: NewFolder,
    base: ModelFolder,
    form: Annotated[Form, typer.Option(help="The form of the files.")] = "serving",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the numbers; default: as they are.")] = None,
    verify: Verifying = "all",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapter_model.bin, its tensors alone, if need be.")
    ] = False,
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another form, with equal outputs: one rank and scaling 1, as servers take it, say.

    In another dtype outputs are equal to its rounding.
    """
    import torch

    from peftc import api
    from peftc.cli.models import with_weights

    require_new(out)
    compiled = api.load(with_weights(base, model_class), adapter, verify=verify, allow_pickle=allow_pickle)
    compiled.save_pretrained(out, form=form, dtype=None if dtype is None else getattr(torch, dtype))
    tell_written(out, "written to", as_json, adapter=adapter, form=form)


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTERS", help="Folders, or repositories of the Hub.")],
    out: NewFolder,
    base: ModelFolder,
    weights: Annotated[str, typer.Option(help="One for each adapter, of any sign: 0.7,-0.3", metavar="NUMBERS")],
    how: Annotated[
        str, typer.Option("--type", help="cat, svd, linear, ties, …, as in add_weighted_adapter.", metavar="TYPE")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Of the result, for svd (default: the largest).")] = None,
    density: Annotated[float | None, typer.Option(help="The share that ties, dare and pruning keep.")] = None,
    majority: Annotated[Literal["total", "frequency"], typer.Option(help="How ties elect a sign.")] = "total",
    verify: Verifying = "all",
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """Write the weighted sum of adapters as one adapter."""
    from peftc import api
    from peftc.cli.models import with_weights

    require_new(out)
    numbers = _numbers(weights, len(adapters))
    names = [f"part{number}" for number in range(len(adapters))]
    compiled = api.load(with_weights(base, model_class), adapters[0], names[0], verify=verify)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        compiled.load_adapter(adapter, name, verify=verify)
    compiled.add_weighted_adapter(
        names, numbers, "default", how, svd_rank=rank, density=density, majority_sign_method=majority
    )
    compiled.save_pretrained(out, selected_adapters=["default"])
    tell_written(out, "written to", as_json, adapters=adapters, weights=numbers)


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{error}: give numbers with commas between them", param_hint="--weights") from None
    if len(numbers) != count:
        raise typer.BadParameter(f"{len(numbers)} numbers for {count} adapters", param_hint="--weights")
    return numbers


def _in_order(found: "Inspected") -> "Inspected":
    """The same as people read it: files have layers as 1, 10, 11, 2."""
    from peftc.view.groups import natural

    sites = tuple(sorted(found.sites, key=lambda site: natural(site.name)))
    return replace(found, sites=sites, others={name: found.others[name] for name in sorted(found.others, key=natural)})


def _show(found: "Inspected") -> None:
    from peftc.view.words import shape

    typer.echo(f"{found.folder}: {found.method}, {found.parameters:,} parameters, {found.bytes:,} bytes")
    typer.echo(f"base       {found.base or 'not said'}")
    if found.fit is not None:
        typer.echo(f"weights    {found.misfit or found.fit}")
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


def _page(found: "Inspected") -> str:
    from peftc.view.heat import Change, adapter_page
    from peftc.view.words import shape

    facts = [
        ("method", found.method),
        ("parameters", f"{found.parameters:,}"),
        ("bytes", f"{found.bytes:,}"),
        ("base", found.base or "not said"),
        ("integrity", found.integrity),
    ]
    facts += [] if found.fit is None else [("weights", found.fit)]
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
    wrong = {"damaged": found.damage, "another base": found.misfit}
    others = [f"{name} {shape(sizes)}" for name, sizes in found.others.items()]
    return adapter_page(found.folder, facts, wrong, changes, others)
