"""transformers' Trainer saves, resumes and reloads compiled models as it does PEFT's: their adapters, nothing else.

It asks whether a model is one of PEFT's by `isinstance`, with names that its modules import once. In these modules the
names become classes of which compiled models are instances too; everything else is the Trainer's own code.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# The modules that ask, and the names by which they do.
_MODULES = ("transformers.trainer_utils", "transformers.trainer")
_CLASSES = ("PeftModel", "PeftMixedModel")

# What they are to take for PEFT's, where it is imported.
_OURS = (("peftc.compiled", "CompiledModel"), ("peftc.peft.models", "PeftModel"))


class _Family(type):
    """The class of classes whose instances are also all compiled models."""

    original: type | None

    def __instancecheck__(cls, instance: Any) -> bool:
        ours = [vars(sys.modules[module])[name] for module, name in _OURS if module in sys.modules]
        return any(isinstance(instance, known) for known in (cls.original, *ours) if known is not None)


def _tell(module: ModuleType) -> None:
    """Let `module` take compiled models for PEFT's."""
    for name in _CLASSES:
        original = vars(module).get(name)
        if not isinstance(original, _Family):
            vars(module)[name] = _Family(name, (), {"original": original})
    vars(module)["is_peft_available"] = _available


def _available(*args: Any, **kwargs: Any) -> bool:
    return True


class _Finder(MetaPathFinder):
    """Tells the modules that ask, when they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader tells it afterwards; None for every other module."""
        if fullname not in _MODULES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec


class _Telling(Loader):
    """A loader that tells the module when it is there."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, and then tell it."""
        self.inner.exec_module(module)
        _tell(module)


def install() -> None:
    """Tell the modules that are imported already, and the others when they are."""
    for name in _MODULES:
        if name in sys.modules:
            _tell(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
