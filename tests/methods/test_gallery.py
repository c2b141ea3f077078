"""The gallery of methods, from what registered rules declare. `python -m tests.methods.test_gallery` writes it."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.peft.methods import METHODS
from peftc.peft.types import PeftType
from peftc.registry import rules, spec_classes
from peftc.rule import Rule

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE, USES = DOCS / "methods.md", DOCS / "uses.yaml"
# What examples have where a script has its tokenizer's words.
_TOLD = {'tokenizer.convert_tokens_to_ids(["<think>", "</think>"])': "[5, 6]", "=ids": "=[5, 6]", "=kinds": "=[2, 4]"}
# peft's folders of the methods that its tuner classes are not named after.
_ELSEWHERE = {
    "ADAPTION_PROMPT": "adaption_prompt",
    "CARTRIDGE": "cartridge",
    "CPT": "cpt",
    "MULTITASK_PROMPT_TUNING": "multitask_prompt_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
}


def by_method() -> dict[str, list[Rule[Any]]]:
    """The rules that are installed, by `peft_type`."""
    found: dict[str, list[Rule[Any]]] = {}
    for rule in rules():
        found.setdefault(str(rule.spec.model_fields["peft_type"].default), []).append(rule)
    return {name: found[name] for name in sorted(found) if type(found[name][0]).__module__.startswith("peftc_rules")}


def files_of(own: Sequence[Rule[Any]]) -> set[Path]:
    """The files that a method is written in: its own, or all of its folder."""
    paths = {Path(str(sys.modules[type(rule).__module__].__file__)) for rule in own}
    folders = {path.parent for path in paths if path.parent.name != "rules"}
    return {path for path in paths if path.parent.name == "rules"} | {p for f in folders for p in f.glob("*.py")}


def lines_of(paths: set[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def theirs(name: str) -> int:
    """The lines of the method's folder in the installed peft."""
    folder = METHODS[PeftType(name)].module if name in METHODS else _ELSEWHERE[name]
    spec = find_spec(f"peft.tuners.{folder}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return lines_of(set(Path(spec.submodule_search_locations[0]).rglob("*.py")))


def yes(value: object) -> str:
    return "✓" if value else ""


def row(name: str, own: Sequence[Rule[Any]]) -> str:
    """What its rules declare, and what follows from that."""
    ops = list(dict.fromkeys(op for rule in own for op in rule.ops))
    folds = any(type(rule).weight is not Rule.weight for rule in own)
    cells: Sequence[Any] = (
        f"[{name}](#{name.lower()})",
        ", ".join(ops),
        yes(folds and all(rule.identity for rule in own)),
        yes(folds),
        yes(folds and any(rule.local for rule in own)),
        yes(any(type(rule).factors is not Rule.factors for rule in own)),
        yes(any(rule.combinations for rule in own)),
        yes(any(rule.scale for rule in own)),
        lines_of(files_of(own)),
        theirs(name),
    )
    return f"| {' | '.join(map(str, cells))} |"


HEADS = (
    "method",
    "sites",
    "fresh = base",
    "merge",
    "in pieces",
    "factors",
    "weighted sums",
    "set_scale",
    "lines",
    "peft's",
)


def llama() -> nn.Module:
    """The shape of a Llama of 8 billion parameters, without any."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256))


def cost(model: nn.Module, example: str) -> str:
    """What the example of a method adds to a model, by its plan."""
    for said, told in _TOLD.items():
        example = example.replace(said, told)
    spec = eval(f"peftc.{example}", {"peftc": peftc})
    plan = peftc.plan(model, spec)
    first = plan.edits[0]
    own = sum(param.numel for param in first.params if param.trainable and not param.shared)
    shared = sum({p.key: p.numel for edit in plan.edits for p in edit.params if p.trainable and p.shared}.values())
    at = f"{own:,} at `{first.site}`" if first.site else f"{own:,} before the tokens"
    parts = [at, *([f"{shared:,} that sites share"] if shared else []), f"{plan.costs.trainable:,} in all"]
    flops = plan.costs.flops_per_token / 1e6
    return f"{', '.join(parts)}; +{f'{flops:,.0f}' if flops >= 100 else f'{flops:.3g}'} MFLOP a token"


def section(name: str, own: Sequence[Rule[Any]], specs: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The formula, its source, what the fields mean, when to take it, and what its example costs."""
    documents = {sys.modules[type(rule).__module__].__doc__ or "" for rule in own}
    said = sorted((inspect.cleandoc(text) for text in documents), key=len)
    spec = inspect.cleandoc(specs[name].__doc__ or "")
    text, _, example = spec.partition("Example: ")
    lines = ["", f"## {name}", "", *(one.partition("\n\n")[0].replace("*", "\\*") for one in said)]
    lines += ["", *text.strip().replace("*", "\\*").splitlines()]
    lines += ["", f"*When*: {uses()[name]}"]
    return [*lines, "", f"    peftc.{example.strip()}", "", f"Trained on the Llama: {cost(model, example.strip())}."]


def uses() -> Mapping[str, str]:
    """When to take a method, by `peft_type`."""
    return yaml.safe_load(USES.read_text())


def page() -> str:
    """The page."""
    methods, specs, model = by_method(), spec_classes(), llama()
    lines = [
        "# Methods",
        "",
        "What the registered rules declare, as `python -m tests.methods.test_gallery` writes it; a test holds it to them.",
        "*merge*: folds into the weight, with exact undo, in memory and on disk; *in pieces*: a large weight is folded",
        "tile by tile. *factors*: its change is a product, so that serving forms, exports with adapters as inputs and",
        "mixed batches take it as one; in other mixed batches each adapter's rows run alone. *lines*: of the method's file",
        "or folder here, and of its folder in peft 0.21.2. Every method but those of virtual tokens is taken through",
        "`check_rule` on every op and layout it serves (`tests/methods`), and compared with peft, files both ways",
        "(`tests/oracle`).",
        "",
        "Under each method is when to take it (`docs/uses.yaml`), and what its example trains and computes beside the",
        "base: on a Llama of 8 billion parameters (width 4096, 32 layers, 8 key-value heads), as the plan says. A change",
        "that is made in the weight costs a call, whatever the number of its tokens, and counts 0 there. What a step takes",
        "in time and memory, and how far it comes on one task, is in [the comparison](comparison.md).",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
        *(row(name, own) for name, own in methods.items()),
    ]
    for name, own in methods.items():
        lines += section(name, own, specs, model)
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_rules_declare() -> None:
    assert PAGE.read_text() == page()


def test_it_is_said_of_every_method_when_to_take_it() -> None:
    assert uses().keys() == by_method().keys()


def test_a_method_is_a_small_file() -> None:
    for name, own in by_method().items():
        for path in files_of(own):
            assert lines_of({path}) <= 150, f"{name}: {path.name}"


if __name__ == "__main__":
    PAGE.write_text(page())
