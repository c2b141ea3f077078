"""What the site's reference makes of docstrings: their examples become code. `mkdocs.yml` names it."""

import ast
import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"\s*\bExample: (.+)$", re.MULTILINE)


class Examples(griffe.Extension):
    """`Example: code` at the end of a line becomes a block, if it is code; `Example::` is markdown but for a colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_block, obj.docstring.value.replace("Example::", "Example:"))


def _block(found: re.Match[str]) -> str:
    try:
        ast.parse(found[1])
    except SyntaxError:
        return found[0]
    return f"\n\n```python\n{found[1]}\n```"
