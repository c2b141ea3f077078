"""`peftc/__init__.pyi` names what `peftc` finds in the registry. Write it anew with `python -m tests.test_stub`."""

from pathlib import Path

import pytest

import peftc
from peftc.registry import spec_classes

STUB = Path(peftc.__file__).with_suffix(".pyi")


def made() -> str:
    """Imports of the public names, as `__init__.py` finds them, and of the spec classes of the installed methods."""
    names = dict(peftc._NAMES)
    for cls in spec_classes().values():
        names[cls.__module__] = (*names.get(cls.__module__, ()), cls.__name__)
    imports = "\n".join(f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names))
    exported = sorted((name for own in names.values() for name in own), key=lambda name: (name.islower(), name))
    listed = "\n".join(f'    "{name}",' for name in exported)
    return f'"""{peftc.__doc__}"""\n\n{imports}\n\n__all__ = [\n{listed}\n]\n'


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
