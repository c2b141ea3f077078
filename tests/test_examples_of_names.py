"""The example in the docstring of every public name, and of the methods of a compiled model, is code that runs."""

import contextlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import peftc
from peftc.registry import spec_classes
from peftc.testing import check_rule
from tests.support.adapters import lora, perturb
from tests.support.documents import stage
from tests.support.models import llama, token_ids


def example(named: Any) -> str | None:
    """The code of the example in a docstring: one line, or a block."""
    text = inspect.cleandoc(named.__doc__ or "")
    block = re.search(r"^Example::\n\n((?:(?: {4}.*)?\n?)+)", text, re.MULTILINE)
    line = re.search(r"\bExample: (.+)$", text, re.MULTILINE)
    return textwrap.dedent(block[1]) if block else line[1] if line else None


def _ours(named: Any) -> bool:
    return inspect.isroutine(named) and str(getattr(named, "__module__", "")).startswith("peftc")


PUBLIC = {name: getattr(peftc, name) for name in peftc.__all__}
PUBLIC |= {cls.__name__: cls for cls in spec_classes().values()}
PUBLIC |= {f"CompiledModel.{name}": own for name, own in inspect.getmembers(peftc.CompiledModel, _ours)}
PUBLIC |= {"Plan.to_html": peftc.Plan.to_html, "testing.check_rule": check_rule}
EXAMPLES = {name: code for name, one in PUBLIC.items() if "__" not in name and (code := example(one)) is not None}


class GainConfig(peftc.AdapterSpec):
    peft_type: Any = "EXAMPLE_GAIN"


class Gain(peftc.Rule[GainConfig]):
    name, spec, ops, local = "example_gain", GainConfig, ("linear",), "oi"

    def params(self, spec: GainConfig, site: Any) -> dict[str, peftc.Param]:
        return {"gain": peftc.Param((site.out_features, 1), "ones", axes="o.")}

    def weight(self, weight: Tensor, p: Any) -> Tensor:
        return weight * p.gain


class Branching(nn.Module):
    """What torch.fx can't trace."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) if x.sum() > 0 else x


def given(folder: Path) -> dict[str, Any]:
    """What examples take for granted, beside the public names."""
    made = stage(folder)
    compiled = perturb(peftc.compile(llama(), lora("q_proj", "lm_head", "up_proj")))
    torch.save(peftc.get_peft_model_state_dict(compiled), folder / "adapter.pt")
    return {
        **{name: getattr(peftc, name) for name in (*peftc.__all__, *(cls.__name__ for cls in spec_classes().values()))},
        **made,
        "F": F,
        "fx": fx,
        "nn": nn,
        "Path": Path,
        "dataclass": dataclass,
        "compiled": compiled,
        "Gain": Gain,
        "GainConfig": GainConfig,
        "TableConfig": GainConfig,
        "PairConfig": GainConfig,
        "rule": Gain(),
        "module": nn.Linear(4, 3),
        "site": SimpleNamespace(in_features=4, out_features=3),
        "loss": torch.ones(()),
        "op": peftc.Op("example", {}),
        "plan": peftc.plan(made["model"], made["spec"]),
        "batches": [made["batch"]],
        "model_with_control_flow": Branching(),
        "another_model": nn.Sequential(nn.Linear(4, 4)),
        "a_rule_without_a_name": type("Nameless", (Gain,), {"name": ""})(),
        "kinds": [1, 1, 2, 2, 3, 3, 4, 4],
        "ids": token_ids(3, 8, 64),
        "tokenizer": SimpleNamespace(convert_tokens_to_ids=lambda tokens: [*range(1, len(tokens) + 1)]),
    }


# Of examples whose `model` is a compiled one.
OF_COMPILED = {"LoadResult", "get_peft_model_state_dict", "set_peft_model_state_dict"}


def before(name: str, known: dict[str, Any]) -> None:
    """What has to be so for one of the examples."""
    if name in OF_COMPILED or (name.startswith("CompiledModel.") and name != "CompiledModel.from_pretrained"):
        known["model"] = known["compiled"]
    elif name == "CPTConfig":
        known["ids"] = [*range(1, 9)]
    elif name in ("calibrate", "Calibration"):
        known["spec"] = lora("q_proj", init_lora_weights="eva", eva_config={"rho": 1.0})
    elif name == "unmerge_checkpoint":
        peftc.merge_checkpoint("base", "adapter", "merged", undo=True, progress=False)
        Path("base").rename("before")
    elif name == "verify":
        known["compiled"].export("exported")
    elif name == "unregister":
        peftc.register(known["rule"])
    elif name == "unregister_op":
        peftc.register_op(known["op"])
    elif name == "ExportError":
        known["compiled"] = peftc.compile(
            known["model"], peftc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )


def after() -> None:
    """What examples have registered is taken back."""
    from peftc.graph.ops import ops
    from peftc.registry import rules

    for rule in [rule for rule in rules() if rule.name == Gain.name]:
        peftc.unregister(rule)
    for op in [op for op in ops().values() if op.name in ("scale", "example")]:
        peftc.unregister_op(op)


SLOW = ("CompiledModel.export", "program_passes")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXAMPLES]
)
@pytest.mark.filterwarnings("ignore")
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = given(tmp_path)
    before(name, known)
    error = getattr(peftc, name, None)
    wrong = isinstance(error, type) and issubclass(error, peftc.PeftcError) and error is not peftc.PeftcError
    try:
        with pytest.raises(error) if wrong else contextlib.nullcontext():
            exec(compile(EXAMPLES[name], name, "exec"), known)
    finally:
        after()


def test_every_public_name_has_one() -> None:
    assert not {*peftc.__all__, *(cls.__name__ for cls in spec_classes().values())} - EXAMPLES.keys()
