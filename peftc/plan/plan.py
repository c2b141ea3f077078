"""The plan's data, its JSON, and how two plans differ."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from peftc.errors import PeftcError, PlanError
from peftc.graph.region import Capture
from peftc.graph.sites import Site
from peftc.registry import spec_classes
from peftc.rule import Constant, Slot
from peftc.specs import AdapterSpec, load_spec
from peftc.view.diff import difference
from peftc.view.network import Network, network
from peftc.view.text import render

VERSION = 1
# The rule name of edits that put a trained copy in a module's place.
MODULES_TO_SAVE = "modules_to_save"


@dataclass(frozen=True)
class PlannedParam:
    """A tensor that an edit adds: name in the rule, checkpoint key at the site, shape, dtype and start."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    init: str
    trainable: bool = True

    @property
    def saved(self) -> bool:
        """Whether checkpoints hold it: what is trained, and what training started from, where that can't be told again."""
        return self.trainable or self.init in ("copy", "rule")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Edit:
    """One change: adapter `adapter` takes slot `slot` of site `site` by rule `rule`.

    Slot `module` puts a trained copy in the module's place (modules_to_save). `opaque`: the site's own forward can't be
    traced and is called as it is. `unmergeable` is the reason why the edit can't be folded, if there is one. `saved_as`:
    what checkpoint keys have for the site, if not its fqn.
    """

    site: str
    adapter: str
    rule: str
    slot: Slot
    params: tuple[PlannedParam, ...]
    constants: dict[str, Constant]
    dropouts: dict[str, float]
    flops_per_token: int = 0
    opaque: bool = False
    unmergeable: str | None = None
    saved_as: str | None = None

    @property
    def virtual(self) -> bool:
        """Whether virtual tokens enter here, from an encoder of its own."""
        return self.slot in ("embeds", "past")


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
    """A selector, pattern, index or site that leads to no edit, with the reason. `error`: compile refuses it."""

    adapter: str
    field: str
    value: str
    reason: str
    error: bool = True

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
class Plan:
    """Everything that compiling would change, in order. Frozen, printable, JSON both ways, diffable.

    `adapters` holds the specs with defaults and shorthands resolved. `sites` describes every site an edit touches.
    `ties` are all groups of parameters that are one tensor. `cautions` are facts worth reading before applying.
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
    version: int = VERSION

    def __str__(self) -> str:
        return render(self)

    def __repr__(self) -> str:
        return f"<Plan: {len(self.edits)} edits on {len(self.sites)} sites of {self.model}, {self.fingerprint}>"

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["adapters"] = {name: spec.to_dict() for name, spec in self.adapters.items()}
        return json.dumps(data, default=dataclasses.asdict, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises PlanError if the text is no plan of this version."""
        try:
            data: Any = json.loads(text)
            if not isinstance(data, dict) or data.get("version") != VERSION:
                raise PlanError(f"plan: version {VERSION} expected; print a new plan with this peftc")
            known = spec_classes()
            data["adapters"] = {name: load_spec(spec, known) for name, spec in data["adapters"].items()}
            fields = _fields()
            return cls(**{name: fields[name].validate_python(value) for name, value in data.items()})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise PlanError(f"plan: not a plan that peftc wrote: {type(error).__name__}: {error}") from None
        except PlanError:
            raise
        except PeftcError as error:
            raise PlanError(f"plan: {error}") from None

    def diff(self, other: "Plan") -> str:
        """What `other` has and this plan lacks (`+`), the reverse (`-`), what differs (`~`); empty if they are equal."""
        return difference(self, other)

    def to_networkx(self) -> Network:
        """Sites and the modules that contain them as nodes, with edges of `relation` contains, tie and conflict."""
        return network(self)


@functools.cache
def _fields() -> dict[str, TypeAdapter[Any]]:
    """How to read each field; the specs are read before."""
    return {name: TypeAdapter(Any if name == "adapters" else kind) for name, kind in get_type_hints(Plan).items()}
