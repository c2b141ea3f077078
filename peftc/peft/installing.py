"""Letting `import peft` mean this package, with every module and its distribution's metadata."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from peftc.errors import AdapterError
from peftc.peft.names import VERSION

# What looks for peft when it is imported, and remembers what it found.
_ASKED = ("transformers.trainer", "trl.trainer", "diffusers", "sentence_transformers", "accelerate")


def install() -> None:
    """Let every `import peft[.x]` from here on give this package's modules, one copy of each, and metadata that says so.

    Raises AdapterError where that is too late: `peft` itself was imported, or a package that has looked for it in vain.
    """
    if _installed():
        return
    theirs = sys.modules.get("peft")
    if theirs is not None:
        raise AdapterError(
            f"peft is imported already (from {getattr(theirs, '__file__', 'somewhere')}), and what has its classes keeps"
            " them. Call peftc.peft.install() before anything imports it, or run `python -m peftc.peft script.py`"
        )
    late = [name for name in _ASKED if name in sys.modules] if find_spec("peft") is None else []
    if late:
        raise AdapterError(
            f"{late[0]} is imported already, and has found no peft. Call peftc.peft.install() before, or run"
            " `python -m peftc.peft script.py`"
        )
    sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Let `import peft` mean what it meant. What was imported meanwhile keeps what it has."""
    for finder in _installed():
        sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        del sys.modules[name]


def _installed() -> list[Any]:
    return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]


_ANY = DistributionFinder.Context()


class _Finder(DistributionFinder):
    """Finds `peft` and its modules, and its distribution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of PEFT's modules, whatever is installed under that name."""
        if fullname != "peft" and not fullname.startswith("peft."):
            return None
        return ModuleSpec(fullname, _Same(), is_package=True)

    def find_distributions(self, context: Any = _ANY) -> Iterable[Distribution]:
        """The distribution of the name `peft`."""
        return [_Metadata()] if context.name is not None and context.name.lower() == "peft" else []


class _Same(Loader):
    """Gives the module of this package."""

    def exec_module(self, module: ModuleType) -> None:
        """Put it in the place of the new one. Raises ModuleNotFoundError if PEFT has no such module."""
        own = f"peftc.{module.__name__}"
        try:
            sys.modules[module.__name__] = importlib.import_module(own)
        except ModuleNotFoundError as error:
            if error.name != own:
                raise
            raise ModuleNotFoundError(
                f"No module named {module.__name__!r} in peft {VERSION}, which peftc stands in for",
                name=module.__name__,
            ) from None


class _Metadata(Distribution):
    """The metadata of peft, as far as programs ask for it."""

    def read_text(self, filename: str) -> str | None:
        """METADATA."""
        message = Message()
        message["Metadata-Version"], message["Name"], message["Version"] = "2.1", "peft", VERSION
        message["Summary"] = "peftc, under PEFT's names"
        return str(message) if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        """None of its files is anywhere."""
        raise PackageNotFoundError("peft")
