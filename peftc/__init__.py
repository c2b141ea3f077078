"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from peftc import errors
from peftc.integrations.trainer import install as _install

# Public names by where they are from. That is imported when one of them is first asked for: the help of the command, and
# whatever else only looks at the package, does without torch.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "peftc.api": (
        "calibrate",
        "compile",
        "get_peft_model_state_dict",
        "load",
        "load_spec",
        "plan",
        "set_peft_model_state_dict",
    ),
    "peftc.checkpoint": ("LoadResult",),
    "peftc.compiled": ("CompiledModel",),
    "peftc.errors": tuple(name for name in errors.__all__ if name.endswith("Error")),
    "peftc.export": ("preflight", "verify"),
    "peftc.graph.ops": ("Form", "Op", "Shape", "register_op", "unregister_op"),
    "peftc.plan": ("Plan",),
    "peftc.product": ("Product",),
    "peftc.prompts.rule": ("PromptRule",),
    "peftc.prompts.specs": ("PromptSpec",),
    "peftc.registry": ("register", "unregister"),
    "peftc.rewrite.calibration": ("Calibration",),
    "peftc.rewrite.passes": ("Pass",),
    "peftc.rewrite.program_passes": ("program_passes",),
    "peftc.rule": ("Argument", "Param", "Rule"),
    "peftc.specs": ("AdapterSpec", "Pattern"),
    "peftc.stream": ("merge_checkpoint", "unmerge_checkpoint"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """`peftc.plan` is the function, also once a package of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_install()
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """A public name; or, `peftc.LoraConfig`, the spec class that a registered method brings."""
    if name in _MODULE_OF:
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value
    found = _registry().spec_class_named(name) if name.endswith("Config") else None
    if found is None:
        raise AttributeError(f"module 'peftc' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return [*__all__, *(cls.__name__ for cls in _registry().spec_classes().values())]


def _registry() -> Any:
    return import_module("peftc.registry")
