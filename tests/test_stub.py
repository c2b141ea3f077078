"""`peftc/__init__.pyi` names what `peftc` finds in the registry. Write it anew with `python -m tests.test_stub`."""

import re
from pathlib import Path

import pytest

import peftc
from peftc.registry import spec_classes

STUB = Path(peftc.__file__).with_suffix(".pyi")


def made() -> str:
    """The text of `__init__.py` with the spec classes of the installed methods in the place of the look-up."""
    source = Path(peftc.__file__).read_text().partition("\n\ndef __getattr__")[0].rstrip()
    classes = sorted(spec_classes().values(), key=lambda cls: (cls.__module__, cls.__name__))
    imports = "\n".join(f"from {cls.__module__} import {cls.__name__}" for cls in classes)
    names = re.findall(r'^    "(\w+)",$', source, re.MULTILINE) + [cls.__name__ for cls in classes]
    listed = "\n".join(f'    "{name}",' for name in sorted(names, key=lambda n: (n.islower(), n)))
    head = source.partition("\n__all__")[0].replace("from typing import Any\n\n", "")
    return f"{head}\n{imports}\n\n__all__ = [\n{listed}\n]\n"


def test_the_stub_is_up_to_date() -> None:
    assert STUB.read_text() == made()


def test_every_spec_class_is_found_and_others_are_not() -> None:
    assert peftc.LoraConfig is spec_classes()["LORA"]
    assert set(dir(peftc)) >= {"LoraConfig", "IA3Config", "compile", "Plan"}
    assert not hasattr(peftc, "NoSuchConfig")


@pytest.mark.parametrize("name", [*peftc.__all__, *(cls.__name__ for cls in spec_classes().values())])
def test_every_public_name_is_explained_with_an_example(name: str) -> None:
    assert "Example" in (getattr(peftc, name).__doc__ or ""), name


if __name__ == "__main__":
    STUB.write_text(made())
