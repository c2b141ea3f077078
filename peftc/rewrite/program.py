"""The rewritten model: what is attached to it, what of that is active, and what it takes to give the base back."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.finding import modules_at
from peftc.graph.region import Region
from peftc.plan import Edit, Plan
from peftc.rewrite.averaging import Averaging
from peftc.rewrite.hosts import BOUND, Binding, Code
from peftc.rewrite.overlay import Overlay
from peftc.rewrite.parts import Adapter
from peftc.rewrite.passes import Pass


@dataclass(frozen=True)
class Replaced:
    """A tensor `leaf` of module `owner` that merging has replaced, and its CRC-32.

    What it was is kept as `original`, the very object; or follows from the merged one, whose CRC-32 is `merged`, and the
    undo log of its tiles; or is gone. `shape`: the merged one's, if that may be another (a head of more classes).
    """

    owner: str
    leaf: str
    crc: int | None
    original: Tensor | None = None
    merged: int | None = None
    shape: tuple[int, ...] | None = None
    log: tuple[Any, ...] = ()


@dataclass
class Merged:
    """What is merged now: `names` of the adapters, what was `replaced`, the adapters' tensors that undo logs go by
    (`factors`), who was learning before (`paused`), and whether the tie of embeddings was cut.
    """

    names: tuple[str, ...] = ()
    replaced: list[Replaced] = field(default_factory=list[Replaced])
    factors: dict[tuple[str, str, str], Tensor] = field(default_factory=dict[tuple[str, str, str], Tensor])
    paused: tuple[str, ...] = ()
    tie_word_embeddings: bool = False


@dataclass
class Given:
    """What was changed of the model as it was given: which parameters trained, and flags `fast_paths` by (fqn, name)."""

    requires_grad: dict[str, bool] = field(default_factory=dict[str, bool])
    fast_paths: dict[tuple[str, str], Any] = field(default_factory=dict[tuple[str, str], Any])


@dataclass
class Made:
    """What was made so far and can be made again: `codes` by what they are made of; `layouts`, what all hosts run, by the
    names that are active; `runs`, what they run, by id, in batches of several, by the set of names; `places`, ops of a
    program that are run by rows there. `sequence_first`: whether modules of the base take positions before rows.
    `averaging`: what averages the gradients of those that learn over processes.
    """

    codes: dict[Any, Code] = field(default_factory=dict[Any, Code])
    layouts: dict[Any, dict[str, Binding]] = field(default_factory=dict[Any, dict[str, Binding]])
    runs: dict[frozenset[str], Mapping[int, Any]] = field(default_factory=dict[frozenset[str], Mapping[int, Any]])
    places: dict[Any, Region] = field(default_factory=dict[Any, Region])
    sequence_first: bool | None = None
    averaging: Averaging | None = None


@dataclass(frozen=True)
class Opened:
    """What is undone after the last of several calls with adapter_names: whether the model itself was made a host for
    them, and the layers whose checkpoints take the route along.
    """

    root: bool
    carried: list[nn.Module]


@dataclass
class Program:
    """A base model with adapters.

    `plan` and `regions` are of all `adapters`. `active`: which are spliced in, in load order, unless merged or the program
    is not `enabled`; `learning`: whose parameters train; `asking`: whose rules ask about the model's call.
    `calls`: how many calls with adapter_names are running, for which the model was `opened`.
    `inplace`: the base is the very model that was given; `unloaded`: it has been given back; `watching`: its rules see
    the steps of optimisers. `passes` run over every graph. `modules`: those of sites, holders and hosts by fqn, looked up
    once; `installed`: what every host runs now; `children`: the names, as keys, of what adapters, of now or before, add
    to modules.
    """

    base: nn.Module
    plan: Plan
    regions: tuple[Region, ...]
    adapters: dict[str, Adapter] = field(default_factory=dict[str, Adapter])
    active: tuple[str, ...] = ()
    learning: tuple[str, ...] = ()
    asking: tuple[str, ...] = ()
    enabled: bool = True
    calls: int = 0
    opened: Opened | None = None
    inplace: bool = False
    unloaded: bool = False
    watching: bool = False
    passes: tuple[Pass, ...] = ()
    overlay: Overlay = field(default_factory=Overlay)
    merge: Merged = field(default_factory=Merged)
    given: Given = field(default_factory=Given)
    made: Made = field(default_factory=Made)
    modules: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    installed: dict[str, Binding] = field(default_factory=dict[str, Binding])
    children: dict[str, None] = field(default_factory=dict[str, None])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        require_no_call(self)
        own = ("base", "adapters", "overlay", "merge", "given")
        new = replace(
            self, **{name: copy.deepcopy(getattr(self, name), memo) for name in own}, made=Made(), watching=False
        )
        new.look_up()
        return new

    def __getstate__(self) -> dict[str, Any]:
        require_no_call(self)
        return {**self.__dict__, "made": Made(), "modules": {}, "installed": {}, "watching": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.look_up()

    def look_up(self) -> None:
        """Look up the modules of all sites, holders and hosts, and what the hosts run."""
        names = {region.host for region in self.regions}
        names |= {name for site in self.plan.sites.values() for name in (site.holder, site.owner)}
        self.modules = modules_at(self.base, names)
        bound = ((host, self.modules[host].__dict__.get(BOUND)) for host in (region.host for region in self.regions))
        self.installed = {host: binding for host, binding in bound if binding is not None}

    @property
    def merged(self) -> tuple[str, ...]:
        """The names of the adapters that are merged."""
        return self.merge.names

    @property
    def spliced(self) -> tuple[str, ...]:
        """The adapters whose ops are in the graphs."""
        return tuple(name for name in self.active if name not in self.merge.names) if self.enabled else ()

    def edits_at(self, site: str, names: Sequence[str]) -> list[Edit]:
        """The edits of the adapters `names` at `site`, in load order."""
        return [
            edit for name in self.adapters if name in names for edit in self.adapters[name].edits if edit.site == site
        ]


def require_no_call(program: Program) -> None:
    """Raise AdapterError inside a call with adapter_names."""
    if program.calls:
        raise AdapterError("the model is in a call with adapter_names and can't be copied before it is over")


def require_idle(program: Program) -> None:
    """Raise AdapterError inside a call with adapter_names, or if the model was unloaded."""
    if program.calls:
        raise AdapterError("the model is in a call with adapter_names; adapters can't be changed before it is over")
    if program.unloaded:
        raise AdapterError("the model was unloaded; compile it again to give it adapters")
