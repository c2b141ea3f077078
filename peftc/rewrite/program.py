"""The rewritten model and its journal: what is attached, active, learning and merged."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.graph.region import Region
from peftc.graph.sites import modules_at
from peftc.plan import MODULES_TO_SAVE, Edit, Plan
from peftc.rewrite.attach import owner_name
from peftc.rewrite.host import Code, code_of
from peftc.rule import live_name


@dataclass(frozen=True)
class Replaced:
    """A tensor `leaf` of module `owner` that merging has replaced, and its CRC-32.

    What it was is kept as `original`, the very object; or follows from the merged one, whose CRC-32 is `merged`, and the
    undo log of its tiles; or is gone.
    """

    owner: str
    leaf: str
    crc: int | None
    original: Tensor | None = None
    merged: int | None = None
    log: tuple[Any, ...] = ()


@dataclass
class Journal:
    """What it takes to give the base model back exactly.

    `brought`: by (name, adapter), tensors that a checkpoint brought its own of and that are not in the model now; with None
    for the adapter, the original. `present`: whose are in the model. `trained`: for a bias that an adapter trains, the
    value that is not in the model now: the original while its name is in `training`, else the trained one. `merged`: what
    merging put something else in the place of, `factors` the adapters' tensors that undo logs go by, `paused` who was
    learning. `tie_word_embeddings`: whether a merge cut that tie. `fast_paths`: (fqn, attribute) → value. `encoders`: for a
    prompt loaded for inference, its rows and the encoder they came from, to be saved with them again.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    brought: dict[tuple[str, str | None], Tensor] = field(default_factory=dict)
    present: dict[str, str | None] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    training: set[str] = field(default_factory=set)
    merged: list[Replaced] = field(default_factory=list)
    factors: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    paused: tuple[str, ...] = ()
    tie_word_embeddings: bool = False
    fast_paths: dict[tuple[str, str], Any] = field(default_factory=dict)
    encoders: dict[str, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)


@dataclass
class Program:
    """A base model with adapters, and what has been made for it so far.

    `active`: what is spliced in, in load order, unless it is `merged` or the program is not `enabled`. `learning`: whose
    parameters train. `routed`: in a call with adapter_names. `inplace`: the base is the very model that was given.
    `installed`: the code that every host runs now. `children`: the names of the modules that adapters, of now or before,
    add to their sites, as keys. The rest is looked up from these and can be made again: `owners`, the
    modules of sites and hosts by fqn; `edits`, by adapter; `slots`, where the trainable parameters of an adapter live;
    `codes`, by what they are made of, so equal hosts share one; `layouts`, the codes of all hosts by what is active;
    `families`, which edits mixed batches fuse.
    """

    base: nn.Module
    plan: Plan
    regions: tuple[Region, ...]
    active: tuple[str, ...] = ()
    learning: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    enabled: bool = True
    routed: bool = False
    inplace: bool = False
    unloaded: bool = False
    journal: Journal = field(default_factory=Journal)
    installed: dict[str, Code] = field(default_factory=dict)
    children: dict[str, None] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    slots: dict[str, list[tuple[dict[str, Any], str]]] = field(default_factory=dict)
    codes: dict[Any, Code] = field(default_factory=dict)
    layouts: dict[Any, dict[str, Code]] = field(default_factory=dict)
    families: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        self._require_own_codes()
        base, journal = copy.deepcopy(self.base, memo), copy.deepcopy(self.journal, memo)
        new = replace(
            self, base=base, journal=journal, codes=dict(self.codes), slots={}, families={}, layouts=dict(self.layouts)
        )
        new.look_up()
        return new

    def __getstate__(self) -> dict[str, Any]:
        self._require_own_codes()
        # Codes are keyed by identity, which a pickle does not keep; they are made again on the next switch.
        made = {"installed", "owners", "edits", "slots", "codes", "layouts", "families"}
        return {**self.__dict__, **{name: {} for name in made}}

    def _require_own_codes(self) -> None:
        if self.routed:
            raise AdapterError("the model is in a call with adapter_names and can't be copied before it is over")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.look_up()

    def look_up(self) -> None:
        """Look up the modules of all sites and hosts, their codes and the edits."""
        places = {region.host: region.host for region in self.regions}
        places |= {fqn: owner_name(site) for fqn, site in self.plan.sites.items()}
        modules = modules_at(self.base, places.values())
        self.owners = {fqn: modules[place] for fqn, place in places.items()}
        codes = ((region.host, code_of(self.owners[region.host])) for region in self.regions)
        self.installed = {host: code for host, code in codes if code is not None}
        self.edits = {name: [] for name in self.plan.adapters}
        for edit in self.plan.edits:
            self.edits[edit.adapter].append(edit)
        self.slots.clear()
        self.families.clear()

    @property
    def spliced(self) -> tuple[str, ...]:
        """The adapters whose ops are in the graphs."""
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    def tensor(self, edit: Edit, key: str) -> Tensor:
        """The live tensor of `edit` with checkpoint key `key`: a parameter, or a buffer of a module saved whole."""
        slots, leaf = self.slot(edit, key)
        return slots[leaf]

    def slot(self, edit: Edit, key: str) -> tuple[dict[str, Any], str]:
        """The dict that holds that tensor, and its name there."""
        *path, leaf = live_path(edit, key)
        module = self.owners[edit.site]
        for name in path:
            module = cast(nn.Module, module._modules[name])
        return tensor_slots(module, leaf), leaf


def tensor_slots(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dict of `module` that holds its own tensor `leaf`: `_parameters` or `_buffers`."""
    return module._parameters if leaf in module._parameters else module._buffers


def live_path(edit: Edit, key: str) -> list[str]:
    """The path from the site to the live tensor of `edit` with checkpoint key `key`."""
    name = f"{MODULES_TO_SAVE}.{edit.adapter}.{key}" if edit.rule == MODULES_TO_SAVE else live_name(key, edit.adapter)
    return name.split(".")
