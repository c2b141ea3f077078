"""One error tree. Every error says what was wrong, where, why, and what to do next."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "ConflictError",
    "ExportError",
    "MergeError",
    "NoMatchError",
    "PeftcError",
    "PlanError",
    "RuleError",
    "SpecError",
    "describe_nearest",
    "nearest",
]


class PeftcError(Exception):
    """Base of every error peftc raises on purpose; nothing was changed when one is raised.

    Wrong input and wrong state are ValueErrors too, as those of PEFT are, which scripts catch.

    Example::

        try:
            model = peftc.compile(model, spec)
        except peftc.PeftcError as error:
            print(error)  # LoraConfig.target_modules: 'q_prj' matches none of 211 sites. Nearest: 'q_proj' (30 sites).
    """


class SpecError(PeftcError, ValueError):
    """An adapter spec is malformed: a wrong type, an unknown field, fields that contradict each other.

    Example: peftc.LoraConfig(r="8")
    """


class CaptureError(PeftcError):
    """A model, or a module of it, can't be captured as a graph.

    Example: peftc.compile(model_with_control_flow, spec, capture="symbolic")
    """


class RuleError(PeftcError):
    """A rule is missing, registered twice, or breaks the rule contract.

    Example: peftc.register(a_rule_without_a_name)
    """


class NoMatchError(PeftcError, ValueError):
    """A selector, pattern or layer index of a spec matches nothing that can be adapted.

    Example: peftc.compile(model, peftc.LoraConfig(target_modules=["q_prj"]))
    """


class ConflictError(PeftcError, ValueError):
    """Two edits claim the same place.

    Example::

        saving = peftc.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
        peftc.compile(model, {"a": saving, "b": peftc.LoraConfig(target_modules=["up_proj"])})
    """


class PlanError(PeftcError):
    """A plan can't be read, or was made for another model.

    Example: peftc.compile(another_model, plan)
    """


class AdapterError(PeftcError, ValueError):
    """An adapter is unknown, exists already, or is not in the state that a call needs.

    Example: compiled.set_adapter("defualt")
    """


class MergeError(PeftcError, ValueError):
    """Adapters can't be folded into the weights, or are merged when they must not be.

    Example: compiled.merge_adapter(), compiled.merge_adapter()
    """


class ExportError(PeftcError):
    """A model, or its adapters, can't be exported as asked.

    Example: compiled.export("out", to="hf")  # with virtual tokens, which no weight can hold
    """


class CheckpointError(PeftcError, ValueError, RuntimeError):
    """An adapter file is missing, unreadable, or does not fit the model.

    Example: peftc.load(model, "a/folder/of/another/model")
    """


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The up to `limit` known names most like `name`, best first."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=limit, cutoff=0.6)


def nearest_hint(name: str, known: Iterable[str], limit: int = 1) -> str:
    """` Nearest: 'q_proj'.` or nothing when there is no near name."""
    near = nearest(name, known, limit)
    return f" Nearest: {', '.join(map(repr, near))}." if near else ""


def describe_nearest(names: Sequence[str], counts: Counter[str], noun: str = "site") -> str:
    """` Nearest: 'q_proj' (30 sites), …` or nothing when there is no near name."""
    if not names:
        return ""
    shown = ", ".join(f"{name!r} ({counts[name]} {noun}{'s' if counts[name] > 1 else ''})" for name in names)
    return f" Nearest: {shown}."
