"""`rules`: the methods that are registered, and what they offer."""

from peftc.cli.arguments import AsJson
from peftc.cli.output import print_json, print_table


def rules(as_json: AsJson = False) -> None:
    """The methods that are installed: what they adapt, what they offer, where they are written.

    same start: a fresh adapter changes nothing, but for some forms of a method; in pieces: large weights are folded tile
    by tile; factors: the change is a product; sums: weighted sums of adapters; scale: its size can be set.
    """
    from peftc.cli.offers import methods

    found = methods()
    if as_json:
        print_json(found)
        return
    rows = [(d["method"], ", ".join(d["ops"]), ", ".join(d["offers"]), d["rules"][0]["file"]) for d in found]
    print_table(("method", "sites", "offers", "file"), rows)
