"""`rules`: the methods that are registered, and what they offer; or what a model does."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from peftc.cli.arguments import AsJson, ModelClass
from peftc.cli.output import print_json, print_table


def rules(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model's folder, config.json or repository of the Hub.")
    ] = None,
    model_class: ModelClass = None,
    as_json: AsJson = False,
) -> None:
    """The methods that are installed: what they adapt, what they offer, where they are written. Of a MODEL: the weights
    that can be adapted, their roles, and what each method adapts by default.

    same start: a fresh adapter changes nothing, but for some forms of a method; in pieces: large weights are folded tile
    by tile; factors: the change is a product; sums: weighted sums of adapters; scale: its size can be set.
    """
    from peftc.cli.offers import methods, offered

    if model is not None:
        from peftc.cli.models import structure

        found = offered(structure(model, model_class))
        if as_json:
            print_json(found)
        else:
            _show(found)
        return
    known = methods()
    if as_json:
        print_json(known)
        return
    rows = [(d["method"], ", ".join(d["ops"]), ", ".join(d["offers"]), d["rules"][0]["file"]) for d in known]
    print_table(("method", "sites", "offers", "file"), rows)


def _show(found: Mapping[str, Any]) -> None:
    from peftc.view.groups import span, unnumbered

    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in found["sites"]:
        plain = site["op"] == "norm" or not site["in_features"]
        sizes = str(site["out_features"]) if plain else f"{site['in_features']} → {site['out_features']}"
        key = (unnumbered(site["name"]), site["op"], sizes, site["role"])
        groups.setdefault(key, []).append(site["name"])
    typer.echo(f"{found['model']} ({found['model_type'] or 'of no known type'}): {len(found['sites'])} sites")
    rows = [(span(names), len(names), op, sizes, role) for (_, op, sizes, role), names in groups.items()]
    print_table(("site", "×", "kind", "in → out", "role"), rows)
    typer.echo()
    told = [
        (method, "; ".join(f"{_named(field)}{_listed(value)}" for field, value in fields.items()))
        for method, fields in found["defaults"].items()
    ]
    print_table(("method", "default targets"), told)
    typer.echo("\nFor the other methods, name the modules (--targets of peftc plan; all-linear for all linear ones).")


def _named(field: str) -> str:
    return "" if field == "target_modules" else f"{field}: "


def _listed(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value)
