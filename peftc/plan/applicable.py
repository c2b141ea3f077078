"""Whether a plan can be carried out: of itself, and on the model at hand."""

import warnings
from dataclasses import replace

from peftc.errors import ConflictError, NoMatchError, PlanError
from peftc.plan.plan import Plan


def require_applicable(plan: Plan, on_unmatched: str) -> None:
    """Raise ConflictError on conflicts, and NoMatchError on misses; `on_unmatched="warn"` makes those a warning."""
    if on_unmatched not in ("error", "warn"):
        raise NoMatchError(f"on_unmatched={on_unmatched!r}: valid are 'error' and 'warn'")
    if plan.conflicts:
        lines = "; ".join(f"{conflict.site or 'the model'}: {conflict.reason}" for conflict in plan.conflicts)
        raise ConflictError(f"{len(plan.conflicts)} conflicts between adapters: {lines}")
    errors = [miss for miss in plan.misses if miss.error]
    if not errors:
        return
    lines = " ".join(f"{type(plan.adapters[miss.adapter]).__name__}.{miss}" for miss in errors[:8])
    more = f" (and {len(errors) - 8} more)" if len(errors) > 8 else ""
    fatal = {miss.adapter for miss in errors if miss.fatal}
    if fatal:
        nothing = not any(edit.adapter in fatal for edit in plan.edits)
        why = "Nothing of the adapter would be left" if nothing else "The adapter can't do without"
        raise NoMatchError(f"{lines.rstrip('.')}{more}. {why}.")
    if on_unmatched == "error":
        raise NoMatchError(
            f"{lines.rstrip('.')}{more}. Mend the spec, or pass on_unmatched='warn' to go on without them."
        )
    warnings.warn(f"{lines}{more}", stacklevel=4)


def require_same(planned: Plan, made: Plan) -> None:
    """Refuse a model whose plan is another one. Misses do not count: a shorthand is resolved in the plan."""
    # A plan made on the meta device or the CPU holds wherever the weights are.
    here = replace(made, sites={fqn: replace(site, device="") for fqn, site in made.sites.items()})
    there = replace(planned, sites={fqn: replace(site, device="") for fqn, site in planned.sites.items()})
    for name in ("model", "fingerprint", "sites", "edits", "trained", "autocast_adapter_dtype"):
        if getattr(there, name) != getattr(here, name):
            lines = there.diff(replace(here, misses=there.misses)).split("\n")
            more = f"\n… and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise PlanError(
                f"the plan does not hold for this {made.model}: its {name} differs. Make a new plan, or change the spec"
                " instead of the plan. From the plan to this model:\n" + "\n".join(lines[:10]) + more
            )
