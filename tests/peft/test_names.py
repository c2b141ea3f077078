"""The table of PEFT's public names, against the installed package. `python -m tests.peft.test_names` rewrites it."""

import importlib
import json
import pkgutil
import sys
import types
import warnings
from pathlib import Path

import peft

import peftc.peft.names as names

FILE = Path(names.__file__).with_name("names.json")
# Names with an underscore that code in the wild imports.
PRIVATE = ("_get_submodules", "_freeze_adapter", "_set_adapter", "_set_trainable", "_get_batch_size")


def public(module: types.ModuleType) -> list[str]:
    """The names that a module of peft offers."""
    found = set(vars(module).get("__all__", ()))
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None)
        own = isinstance(home, str) and home.split(".")[0] == "peft" and not name.startswith("_")
        constant = name.isupper() and not name.startswith("_")
        if (own or constant or name in PRIVATE) and not isinstance(value, types.ModuleType):
            found.add(name)
    return sorted(found)


def table() -> dict[str, list[str]]:
    """The names by module, for modules that import here."""
    found: dict[str, list[str]] = {}
    for path in ["peft", *(module.name for module in pkgutil.walk_packages(peft.__path__, "peft."))]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[path.removeprefix("peft").lstrip(".")] = public(importlib.import_module(path))
        except ImportError:
            print(f"{path} needs a package that is not here", file=sys.stderr)
    return found


def written(found: dict[str, list[str]]) -> str:
    """One module a line."""
    lines = [f"{json.dumps(module)}: {json.dumps(own)}" for module, own in sorted(found.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def test_the_table_is_that_of_the_installed_package() -> None:
    assert peft.__version__ == names.VERSION
    known = json.loads(FILE.read_text())
    # Some names are there only where packages for quantised models are.
    missing = {module: set(own) - set(known.get(module, ())) for module, own in table().items()}
    assert not {module: own for module, own in missing.items() if own}
    assert set(known[""]) >= set(peft.__all__)


if __name__ == "__main__":
    FILE.write_text(written(table()))
