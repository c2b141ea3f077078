"""A merge of adapters into a checkpoint: what is known of it, and where its tensors lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peftc.checkpoint import AdapterFiles, Verify
from peftc.checkpoint.lazy import FileTensors
from peftc.checkpoint.state import Fit, key_of
from peftc.graph.sites import WeightSite
from peftc.merge import fold
from peftc.merge.fold import Value
from peftc.plan import Edit, PlannedParam
from peftc.rewrite.program import Program
from peftc.stream.names import Names
from peftc.stream.sharded import Checkpoint


@dataclass(frozen=True)
class Options:
    """How adapters are merged into a checkpoint; see `merge_checkpoint`.

    `tile`: elements that are computed at a time. `brought`: on the way back, the parameters that adapters brought.
    """

    weights: tuple[float, ...] | None = None
    untie: bool = False
    verify: Verify = "all"
    undo: bool = False
    brought: frozenset[str] | None = None
    tile: int = field(default_factory=lambda: fold.TILE)


@dataclass(frozen=True)
class Source:
    """An adapter: its open file, the same as it is laid out here, and where these tensors belong."""

    files: AdapterFiles
    original: FileTensors
    tensors: FileTensors
    fit: Fit


@dataclass(frozen=True)
class Change:
    """A new value of a parameter: `edits` folded into it, or into the tensor that an adapter brings in its place.

    `start`: the adapter and the key in its file of that tensor. `scale`: by what the result is multiplied.
    """

    parameter: str
    edits: tuple[Edit, ...] = ()
    is_bias: bool = False
    start: tuple[str, str] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Work:
    """A merge that was thought through: `program` is the model with the adapters, on the meta device.

    `cut`: parameters that are no longer tied to others. `following`: sites at which tensors of adapters follow from the
    base's weight, so that this can't be estimated from what was merged. `value` gives an adapter's tensors as loading
    would leave them; `computed`: those that follow from weights, of what adapters share, and of the last site.
    """

    checkpoint: Checkpoint
    shards: Mapping[str, FileTensors]
    names: Names
    program: Program
    sources: Mapping[str, Source]
    options: Options
    value: Value
    changes: Mapping[str, Change] = field(default_factory=dict[str, Change])
    computed: dict[tuple[str, str], Mapping[str, Tensor]] = field(
        default_factory=dict[tuple[str, str], Mapping[str, Tensor]]
    )
    cut: tuple[str, ...] = ()
    following: frozenset[str] = frozenset()


def file_of(work: Work, stored: str) -> FileTensors:
    """The open shard that has the tensor `stored`."""
    return work.shards[work.checkpoint.where[stored]]


def stored_name(work: Work, parameter: str) -> str | None:
    """The tensor in the files that is `parameter`, by itself or by another name of the same; None if there is no one."""
    return stored_as(work.names, work.program.plan.ties, parameter)


def stored_as(names: Names, ties: Sequence[Sequence[str]], parameter: str) -> str | None:
    """The same of a model that is tied like this."""
    direct = names.direct
    if parameter in direct:
        return direct[parameter]
    group = next((group for group in ties if parameter in group), ())
    return next((direct[name] for name in group if name in direct), None)


def weight_site(work: Work, edit: Edit) -> WeightSite:
    """The site of an edit that is folded."""
    site = work.program.plan.sites[edit.site]
    assert isinstance(site, WeightSite), "others hold modules"
    return site


def file_key(work: Work, edit: Edit, param: PlannedParam) -> str:
    """The key of a parameter in its adapter's files."""
    return key_of(work.program.adapters[edit.adapter].spec, edit, param)
