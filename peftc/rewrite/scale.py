"""How much of an adapter's change is applied: a factor at run time on the constant that its rules scale with."""

import math
from dataclasses import replace
from typing import Any, cast

from peftc.errors import AdapterError
from peftc.rewrite.program import Program


def set_scale(program: Program, name: str, scale: float) -> None:
    """Let adapter `name` change the base by `scale` times what it was trained to: no graph changes, and nothing compiles.

    Raises AdapterError for what is no finite number, and for methods that have no such factor; nothing is changed then.
    """
    if isinstance(cast(Any, scale), bool) or not isinstance(cast(Any, scale), int | float) or not math.isfinite(scale):
        raise AdapterError(f"set_scale: expected a finite number, got {scale!r}")
    adapter = program.adapters[name]
    planned = {(edit.site, edit.rule.name): edit for edit in program.plan.edits if edit.adapter == name}
    parts = [part for part in adapter.parts.values() if not part.edit.whole]
    if not parts or any(part.edit.rule.scale is None for part in parts):
        raise AdapterError(f"set_scale: {adapter.spec.peft_type} ({name!r}) has no factor that scales its change")
    for part in parts:
        edit, constant = planned[part.edit.site, part.edit.rule.name], str(part.edit.rule.scale)
        value = float(cast(float, edit.constants[constant])) * scale
        part.become(replace(edit, constants={**edit.constants, constant: value}))
    adapter.scale = float(scale)
