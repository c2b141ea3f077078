"""PEFT's documented names, served by peftc: code written for `peft` runs with `from peftc.peft import …` in its place.

`install()`, or `python -m peftc.peft script.py`, lets `import peft` itself mean this package.

Example::

    from peftc.peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
"""

from typing import Any

from peftc.peft.installing import install, uninstall
from peftc.peft.names import find_modules, resolve, table

find_modules()

__all__ = [*table()[""], "install", "uninstall"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """PEFT's names; those that are not served say so when they are used."""
    value = globals()[name] = resolve("", name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
