"""PEFT's modules and names: which of them are served, and by what; the others say so when they are used.

The modules of PEFT (`peftc.peft.tuners.lora.layer`, …) have no files here: they are made when they are imported, with the
names that `names.json` lists, and these are found in the few files that implement them.
"""

import functools
import importlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.resources import files
from types import ModuleType
from typing import Any, Literal

from peftc.errors import PeftcError
from peftc.peft.methods import METHODS
from peftc.peft.types import VERSION
from peftc.specs.io import absent

_HERE = "peftc.peft"
_HOMES = (
    "models",
    "reported",
    "configs",
    "types",
    "functions",
    "tuner",
    "adapted",
    "wrappers",
    "layers",
    "autos",
    "encoders",
    "prefixes",
    "hotswap",
    "contexts",
    "conversion",
    "starts",
    "loftq",
    "learning_rates",
    "preconditioned",
)
# Names that are not those of what serves them.
_OTHERWISE = {"_get_submodules": "functions.submodules_at", "BasePromptEncoder": "encoders.PromptEmbedding"}
_OTHERWISE["AdamssAsaCallback"] = "callbacks.AdamssAsaCallback"
# Names that mean something else in every method's module: those of the methods here.
_BY_METHOD: dict[str, dict[str, str]] = {
    "tuners.lora": {
        name: f"layers.{name}" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")
    },
    "tuners.fourierft": dict.fromkeys(("FourierFTLinear", "FourierFTLayer"), "layers.FourierFTLayer"),
}
_ALIKE = frozenset(_BY_METHOD["tuners.lora"])
for _method in METHODS.values():
    # Every layer of another method is of its one class here.
    _BY_METHOD.setdefault(
        f"tuners.{_method.module}", dict.fromkeys((*_ALIKE, _method.layer), f"layers.{_method.layer}")
    )
    _OTHERWISE.update({_method.model: f"tuner.{_method.model}", _method.layer: f"layers.{_method.layer}"})

Kind = Literal["served", "to come", "refused"]


class NotServedError(PeftcError, NotImplementedError):
    """A name of PEFT was used that peftc does not serve."""


@functools.cache
def table() -> dict[str, list[str]]:
    """The public names of PEFT by module, without the leading `peft.`."""
    return json.loads(files(_HERE).joinpath("names.json").read_text("utf-8"))


def kind_of(module: str, name: str) -> tuple[Kind, str]:
    """Whether a name is served; and by what, or why not."""
    if _served(module, name) is not None:
        return "served", ""
    tuners = (path for path, names in table().items() if path.startswith("tuners.") and name in names)
    origin = module if module else next(tuners, module)
    parts = origin.split(".")
    if len(parts) > 1 and parts[0] == "tuners" and parts[1] not in ("tuners_utils", "_buffer_dict"):
        missing = absent().get(parts[1].upper(), "the method has no part of this name yet")
        return "to come", f"{parts[1]}: {missing}"
    return "refused", _WAYS.get(name, "it is a part of PEFT's own machinery, which is another here")


# What to do instead.
_WAYS = {
    "create_arrow_model": "combine adapters with add_weighted_adapter, or use several in a batch (adapter_names)",
    "register_peft_method": "methods are rules: peftc.register(rule)",
    "find_kappa_target_modules": "choose targets with peftc.plan and pass them as target_modules",
    "bloom_model_postprocess_past_key_value": "prefixes have the layout of the model's own cache here",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "prefixes have the layout of the model's own cache here",
}


def resolve(module: str, name: str) -> Any:
    """What `name` of PEFT's `module` is here. Raises AttributeError if PEFT has no such name."""
    inner = f"{module}.{name}".lstrip(".")
    if inner in table() and name not in table().get(module, ()):
        return importlib.import_module(f"{_HERE}.{inner}")
    if name == "__version__" and not module:
        return VERSION
    served = _served(module, name)
    if served is not None:
        return served[0]
    if name in table().get(module, ()):
        return _absent(name, *kind_of(module, name))
    raise AttributeError(f"module 'peft{f'.{module}' if module else ''}' has no attribute {name!r}")


@functools.cache
def _served(module: str, name: str) -> tuple[Any] | None:
    """What serves a name, in a tuple."""
    for method, own in _BY_METHOD.items():
        if name in own and f"{module}.".startswith(f"{method}."):
            return (_at(own[name]),)
    if name in _ALIKE:
        return None
    if name in _OTHERWISE:
        return (_at(_OTHERWISE[name]),)
    mappings = importlib.import_module(f"{_HERE}.mappings")
    if name in mappings.TABLES:
        return (mappings.TABLES[name](),)
    if name in mappings.ASKING:
        return (mappings.ASKING[name],)
    for home in _HOMES:
        found = importlib.import_module(f"{_HERE}.{home}")
        if name in found.__all__:
            return (getattr(found, name),)
    if name.endswith("Config"):
        configs = importlib.import_module(f"{_HERE}.configs")
        found = getattr(configs, name, None)
        return None if found is None else (found,)
    return None


def _at(path: str) -> Any:
    home, _, name = path.partition(".")
    return getattr(importlib.import_module(f"{_HERE}.{home}"), name)


@functools.cache
def _absent(name: str, kind: Kind, why: str) -> Any:
    """A stand-in for what is not served: imports and isinstance take it, and using it says why it is not."""
    if name.isupper():
        return {}
    message = f"peft's {name}: {'peftc has it not yet' if kind == 'to come' else 'peftc does not serve it'}; {why}"

    def refuse(self: Any = None, *args: Any, **kwargs: Any) -> Any:
        raise NotServedError(message)

    if not name[:1].isupper():
        refuse.__name__ = name
        return refuse
    return type(name, (), {"__init__": refuse, "from_pretrained": classmethod(refuse), "__module__": f"{_HERE}.names"})


class _Finder(MetaPathFinder):
    """Finds the modules of PEFT that have no file here."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the table."""
        inner = fullname.removeprefix(f"{_HERE}.")
        if inner == fullname or inner not in table():
            return None
        package = any(other.startswith(f"{inner}.") for other in table())
        return ModuleSpec(fullname, _Making(), is_package=package)


class _Making(Loader):
    """Makes a module whose names are resolved when they are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        """Give it its names."""
        inner = module.__name__.removeprefix(f"{_HERE}.")
        vars(module)["__all__"] = [name for name in table()[inner] if not name.startswith("_")]
        vars(module)["__getattr__"] = functools.partial(_kept, module, inner)
        vars(module)["__dir__"] = lambda: sorted({*table()[inner], *vars(module)})


def _kept(module: ModuleType, inner: str, name: str) -> Any:
    value = vars(module)[name] = resolve(inner, name)
    return value


def find_modules() -> None:
    """Let PEFT's modules be found under this package; once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
