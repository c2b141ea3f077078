"""How views say things: amounts with their units, sizes of a site, what an edit inserts, what needs a reader's eye."""

from collections.abc import Sequence
from math import prod
from typing import Any

from peftc.edits import Edit, Planned

_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def title(plan: Planned) -> str:
    """The plan in one line."""
    sites = len({edit.site for edit in plan.edits})
    adapters = ", ".join(f"{name} ({spec.peft_type})" for name, spec in plan.adapters.items())
    return (
        f"Plan for {plan.model}: {counted(len(plan.edits), 'edit')} on {counted(sites, 'site')}, adapter {adapters},"
        f" capture={plan.capture}, fingerprint {plan.fingerprint}"
    )


def columns(plan: Planned) -> list[str]:
    """What the rules of the plan want shown of their edits."""
    return list(dict.fromkeys(column for edit in plan.edits for column in edit.rule.columns))


def column(edit: Edit, name: str) -> str:
    """What an edit has for a column of its plan."""
    return number(edit.constants.get(edit.rule.columns.get(name, "")))


def sizes(site: Any) -> str:
    """`in → out` of a site with a weight."""
    return f"{site.in_features} → {site.out_features}" if getattr(site, "in_features", 0) else "–"


def inserted(edit: Edit) -> str:
    """`lora @output`: the rule and the operands that it replaces."""
    return "trained copy" if edit.whole else f"{edit.rule.name} @{'+'.join(edit.slots)}"


def facts(edit: Edit) -> list[str]:
    """`scaling = 2`, `lora_dropout p = 0.1`: constants and dropouts of an edit, but for what is off."""
    constants = [f"{name} = {number(value)}" for name, value in edit.constants.items() if value is not False]
    return constants + [f"{name} p = {number(value)}" for name, value in edit.dropouts.items() if value]


def shape(sizes: Sequence[int]) -> str:
    """`16×8192`."""
    return "×".join(map(str, sizes))


def share(plan: Planned) -> float:
    """How much of the parameters trains."""
    return plan.costs.trainable / plan.costs.total if plan.costs.total else 0


def added(plan: Planned) -> str:
    """`added in float32`: the dtypes of the tensors that are."""
    found = ", ".join(dict.fromkeys(param.dtype for edit in plan.edits for param in edit.params))
    return f"added in {found}" if found else "nothing is added"


def flops_unit(plan: Planned) -> str:
    """What the FLOPs are counted per: a convolution has output positions where others have tokens."""
    convolutions = any(site.op.startswith("conv") for site in plan.sites.values())
    return "token or output position" if convolutions else "token"


def notes(plan: Planned) -> list[tuple[str, list[str]]]:
    """What the table can't say, under its label; what needs a reader's eye comes last."""
    found = [
        (
            "virtual",
            [line for edit in plan.edits for line in edit.rule.summary(edit.adapter, edit.constants, edit.slots)],
        ),
        ("biases", _biases(plan)),
        ("ties", [" = ".join(group) for group in plan.ties]),
        ("caution", list(plan.cautions)),
        ("conflict", [f"{conflict.site or 'model'}: {conflict.reason}" for conflict in plan.conflicts]),
        ("missed", [str(miss) for miss in plan.misses if miss.error]),
        ("passed by", [str(miss) for miss in plan.misses if not miss.error]),
    ]
    return [(label, lines) for label, lines in found if lines]


def _biases(plan: Planned) -> list[str]:
    if not plan.trained:
        return []
    numel = sum(prod(tensor.shape) for tensor in plan.trained)
    return [f"{len(plan.trained)} of the base model trained on copies ({numel:,} parameters)"]


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: object) -> str:
    """A constant, or a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flops(number: int) -> str:
    """`411.8 MFLOP`."""
    return _scaled(number, 1000, _FLOPS)


def in_bytes(number: int) -> str:
    """`129.2 GiB`."""
    return _scaled(number, 1024, _BYTES)


def short(number: int) -> str:
    """`69.18 B`: a number of parameters."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T")).strip()


def _scaled(number: int, step: int, units: Sequence[str]) -> str:
    value, unit = float(number), 0
    while value >= step and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{value:.4g} {units[unit]}"
