"""The plan: what will change, in order, and what does not match; printable, JSON both ways, diffable."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import nn

from peftc.edits import Planned
from peftc.plan.json import read_json, to_json
from peftc.view.diff import difference
from peftc.view.text import render

if TYPE_CHECKING:
    from peftc.view.network import Network


@dataclass(frozen=True, repr=False)
class Plan(Planned):
    """Everything that compiling would change, in order. Frozen, printable, JSON both ways, diffable.

    `adapters` holds the specs with defaults and shorthands resolved. `sites` describes every site an edit touches.
    `ties` are all groups of parameters that are one tensor. `cautions` are facts worth reading before applying.

    Example: print(peftc.plan(model, peftc.LoraConfig(target_modules="all-linear")))
    """

    def __str__(self) -> str:
        return render(self)

    def __repr__(self) -> str:
        return f"<Plan: {len(self.edits)} edits on {len(self.sites)} sites of {self.model}, {self.fingerprint}>"

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A plan from the text of `to_json`, of this version or an earlier one. Raises PlanError if it is none."""
        return cls(**read_json(text))

    def diff(self, other: Planned) -> str:
        """What `other` has and this plan lacks (`+`), the reverse (`-`), what differs (`~`); empty if they are equal."""
        return difference(self, other)

    def to_html(self, other: Planned | None = None, *, model: nn.Module | None = None) -> str:
        """The plan as one HTML page that needs nothing beside it; with `other`, a plan of the same model, side by side.

        `model`, which may be on the meta device: what of it is not adapted is in the tree, too. Raises PlanError if the
        plan is of another one. Example: Path("plan.html").write_text(plan.to_html(model=model), encoding="utf-8")
        """
        from peftc.view.page import plan_page  # Late, as in to_networkx.

        return plan_page([self] if other is None else [self, other], model)

    def _repr_html_(self) -> str:
        from peftc.view.page import plan_table  # Late, as in to_networkx.

        return plan_table(self)

    def to_networkx(self) -> "Network":
        """Sites and the modules that contain them as nodes, with edges of `relation` contains, tie and conflict."""
        from peftc.view.network import network  # Late: who compiles only need not wait for networkx.

        return network(self)
