"""How much of an adapter's change is applied: a factor at run time on the constant that its rules scale with."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from peftc.errors import AdapterError
from peftc.plan import Edit
from peftc.registry import is_own
from peftc.rewrite.parts import Adapter, Part
from peftc.rewrite.program import Program


def set_scale(program: Program, name: str, scale: float) -> None:
    """Let adapter `name` change the base by `scale` times what it was trained to: no graph changes, and nothing compiles.

    Raises AdapterError for what is no finite number, and for methods that have no such factor; nothing is changed then.
    """
    if isinstance(cast(Any, scale), bool) or not isinstance(cast(Any, scale), int | float) or not math.isfinite(scale):
        raise AdapterError(f"set_scale: expected a finite number, got {scale!r}")
    adapter = program.adapters[name]
    planned = {(edit.site, edit.rule.name): edit for edit in program.plan.edits if edit.adapter == name}
    parts = [part for part in adapter.parts.values() if is_own(adapter.spec, part.edit.rule)]
    if not parts or any(part.edit.rule.scale is None for part in parts):
        raise AdapterError(f"set_scale: {adapter.spec.peft_type} ({name!r}) has no factor that scales its change")
    for part in parts:
        _scale(part, planned[part.edit.site, part.edit.rule.name], lambda planned, now: planned * scale)
    adapter.scale = float(scale)


def set_scale_at(adapter: Adapter, planned: Edit, scaled: Callable[[float, float], float]) -> None:
    """Let the constant that scales an edit of the plan be `scaled` (as planned, as it is now).

    The adapter's scale is then that of the site: if others differ, it is theirs who were set last. Raises AdapterError if
    the method has no such constant.
    """
    if planned.rule.scale is None:
        raise AdapterError(
            f"{planned.site}: {planned.rule.name} ({adapter.name!r}) has no factor that scales its change"
        )
    before, after = _scale(adapter.part(planned), planned, scaled)
    adapter.scale = after / before if before else after


def _scale(part: Part, planned: Edit, scaled: Callable[[float, float], float]) -> tuple[float, float]:
    """Let a part go by the constant `scaled` (as planned, as it is now); the first of these and the new one."""
    constant = str(planned.rule.scale)
    before, now = (float(cast(float, edit.constants[constant])) for edit in (planned, part.edit))
    after = float(scaled(before, now))
    part.become(replace(planned, constants={**planned.constants, constant: after}))
    return before, after
