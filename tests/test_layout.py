"""What test files share lies in tests/support: none of them imports from another."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def imported(file: Path) -> Iterator[str]:
    """The full names of what `file` imports, inside of functions too."""
    package = [TESTS.name, *file.relative_to(TESTS).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def test_no_test_file_is_imported() -> None:
    modules = {file.stem for file in TESTS.rglob("test_*.py")}
    found = {
        f"{file.relative_to(TESTS)}: {name}"
        for file in TESTS.rglob("*.py")
        for name in imported(file)
        if name.startswith("tests.") and not modules.isdisjoint(name.split("."))
    }
    assert modules
    assert not found
