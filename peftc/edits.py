"""What a plan is made of: edits and what they add, what is trained in place, misses, conflicts, costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from pydantic import InstanceOf

from peftc.graph.region import Capture
from peftc.graph.sites import Site
from peftc.rule import Constant, Rule
from peftc.specs import AdapterSpec

VERSION = 2


@dataclass(frozen=True)
class PlannedParam:
    """A tensor that an edit adds: name in the rule, checkpoint key at the site, shape, dtype and start; the rest as in
    `Param`. `shared`: all sites of the adapter have this one.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    init: str
    trainable: bool = True
    use: Literal["matrix", "vector", "lookup"] = "matrix"
    axes: str | None = None
    seed: int | None = None
    stored: float = 1.0
    shared: bool = False
    kept: bool = True

    @property
    def saved(self) -> bool:
        """Whether checkpoints hold it: what is trained, and what training started from, where that can't be told again."""
        start = self.init in ("copy", "rule", "gathered") or (self.init == "drawn" and self.seed is None)
        return self.trainable or (start and self.kept)

    @property
    def is_table(self) -> bool:
        """Whether it follows from the spec, or the weight, and nobody trains or saves it: a buffer."""
        return not self.kept and not self.trainable

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Edit:
    """One change: adapter `adapter` replaces the operands `slots` of site `site` by rule `rule`.

    `opaque`: the site's own forward can't be traced and is called as it is. `unmergeable` is the reason why the edit can't
    be folded, if there is one. `saved_as`: what checkpoint keys have for the site, if not its fqn. `follows`: the site,
    whose weight is the very tensor, of the edit that this one follows: its tensors are that one's.
    """

    site: str
    adapter: str
    rule: InstanceOf[Rule[Any]]
    slots: tuple[str, ...]
    params: tuple[PlannedParam, ...]
    constants: dict[str, Constant]
    dropouts: dict[str, float]
    flops_per_token: int = 0
    opaque: bool = False
    unmergeable: str | None = None
    saved_as: str | None = None
    follows: str | None = None

    @property
    def whole(self) -> bool:
        """Whether a trained copy stands in the place of the whole module (modules_to_save)."""
        return self.rule.whole


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor of the base model that is trained in place, on a copy (a bias): name, shape, dtype, checkpoint key."""

    name: str
    adapter: str
    shape: tuple[int, ...]
    dtype: str
    key: str


@dataclass(frozen=True)
class Miss:
    """A selector, pattern, index or site that leads to no edit, with the reason. `error`: compile refuses it.

    `fatal`: nothing of the adapter would be left without what is missing, or it can't do without.
    """

    adapter: str
    field: str
    value: str
    reason: str
    error: bool = True
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r} {self.reason}"


@dataclass(frozen=True)
class Conflict:
    """Two adapters that claim places which exclude each other."""

    site: str
    owners: tuple[str, str]
    reason: str


@dataclass(frozen=True)
class Costs:
    """Totals over all adapters of a plan: parameters, bytes, and added FLOPs per token (or output position).

    `adam_bytes`: two float32 moments per trainable parameter.
    """

    trainable: int
    total: int
    weight_bytes: int
    gradient_bytes: int
    adam_bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class Planned:
    """All that a plan says. `adapters` holds the specs with defaults and shorthands resolved, `sites` describes every site
    an edit touches, `ties` are all groups of parameters that are one tensor, `cautions` facts worth reading. `flows`: of a
    program, which matrices feed which, by name, with no other matrix between.
    """

    model: str
    capture: Capture
    fingerprint: str
    adapters: Mapping[str, AdapterSpec]
    sites: Mapping[str, Site]
    edits: tuple[Edit, ...]
    trained: tuple[TrainedTensor, ...]
    misses: tuple[Miss, ...]
    conflicts: tuple[Conflict, ...]
    ties: tuple[tuple[str, ...], ...]
    cautions: tuple[str, ...]
    autocast_adapter_dtype: bool
    costs: Costs
    flows: tuple[tuple[str, str], ...] = ()
    version: int = VERSION

    def edits_of(self, adapter: str) -> list[Edit]:
        """The edits of one adapter, in order."""
        return [edit for edit in self.edits if edit.adapter == adapter]
