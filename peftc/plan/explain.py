"""Why a site is adapted, or is not: what each adapter's spec makes of it."""

from peftc.edits import Edit
from peftc.graph.sites import SiteIndex, WeightSite
from peftc.plan.match import in_layer
from peftc.plan.plan import Plan
from peftc.registry import find_rule, ops_of
from peftc.specs import AdapterSpec, LayerSelection, ParameterSelection
from peftc.specs.selection import selects


def site_lines(plan: Plan, index: SiteIndex, fqn: str) -> list[str]:
    """What is at `fqn`, and for every adapter of `plan` what it does there or why nothing."""
    site = {**index.inner, **index.sites}.get(fqn)
    if site is None:
        what = (
            f"a {index.modules[fqn]}, which is no op of the table with a weight"
            if fqn in index.modules
            else "no module"
        )
        inside = index.hosted.get(fqn, ())
        what += f"; its weights are {', '.join(inside)}" if inside else ""
        edits = [edit for edit in plan.edits if edit.site == fqn]
        lines = [f"  {edit.adapter} ({plan.adapters[edit.adapter].peft_type}): {_edit_line(edit)}" for edit in edits]
        return [f"{fqn or 'the model'}: {what}", *lines]
    stored = " stored in × out," if site.layout == "in_out" else ""
    sizes = f"{site.in_features} → {site.out_features}" if site.op != "norm" else str(site.out_features)
    sizes = f"{site.experts} × {sizes}" if site.experts is not None else sizes
    facts = [f"{site.op} {sizes} ({site.module}),{stored} {site.dtype}"]
    facts += [f"role {site.role}"] if site.role else []
    facts += [f"tied to {', '.join(name for name in site.tied if name != site.weight)}"] if site.tied else []
    lines = [f"{fqn}: {'; '.join(facts)}"]
    for adapter, spec in plan.adapters.items():
        edits = [edit for edit in plan.edits if edit.adapter == adapter and edit.site == fqn]
        told = [_edit_line(edit) for edit in edits] or [f"not adapted: {why_not(spec, site, index)}"]
        lines += [f"  {adapter} ({spec.peft_type}): {one}" for one in told]
    return lines


def _edit_line(edit: Edit) -> str:
    params = ", ".join(f"{param.name} {'×'.join(map(str, param.shape))}" for param in edit.params)
    if edit.whole:
        return f"trains a copy of it: {params}"
    reason = f"; can't be merged: {edit.unmergeable}" if edit.unmergeable else ""
    return f"{edit.rule.name} @{'+'.join(edit.slots)} adds {params}{reason}"


def why_not(spec: AdapterSpec, site: WeightSite, index: SiteIndex) -> str:
    """The first reason why `spec` leaves `site` alone."""
    if site.op not in ops_of(spec):
        return f"{spec.peft_type} adapts {', '.join(ops_of(spec))}, and this is {site.op}"
    if site.refusal is not None:
        return site.refusal
    targets = spec.named_targets
    if site.host is not None:
        named = spec.target_parameters if isinstance(spec, ParameterSelection) else None
        return f"target_parameters={list(named or ())!r} does not name it"
    if spec.target_modules is not None and targets != "all-linear" and not selects(targets, site.fqn):
        told = f"target_modules={targets if isinstance(targets, str) else list(targets)!r} does not name it"
        return told + (" (nor does 'all-linear': it is the output layer)" if site.fqn == index.output_embedding else "")
    if spec.exclude_modules and selects(spec.exclude_modules, site.fqn):
        return "exclude_modules names it"
    if isinstance(spec, LayerSelection) and not in_layer(spec, site.fqn):
        return f"layers_to_transform={list(spec.layers_to_transform or ())} leaves its layer out"
    whole = next((name for name in spec.modules_to_save or () if site.fqn.endswith(name)), None)
    if whole is not None:
        return f"modules_to_save={whole!r} trains a copy of it"
    rule = find_rule(spec, site)
    return (rule.refusal(spec, site) if rule is not None else None) or "it was not there when the adapter was planned"
