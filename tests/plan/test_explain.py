"""What `explain` says of a place: what is adapted there, what is not and why, and where the nodes of its graph are from."""

import re

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.models import tiny


class Two(nn.Module):
    """Two linears, which torch.fx traces, and a module of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Experts(nn.Module):
    """Three matrices, used in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


def told(compiled: peftc.CompiledModel, fqn: str) -> list[str]:
    """The lines, without the numbers of lines in source files."""
    return re.sub(r"\.py:\d+", ".py", compiled.explain(fqn)).split("\n")


def test_an_adapted_linear_and_one_that_is_left_alone() -> None:
    compiled = peftc.compile(Two(), peftc.LoraConfig(r=2, target_modules=["a"]))
    assert told(compiled, "a") == [
        "a: linear 4 → 4 (Linear), float32",
        "  default (LORA): lora @output adds lora_A 2×4, lora_B 4×2",
        "  its graph has 4 nodes of the module itself",
        "  from lora of 'default' (a0), LoraLinear.output (lora/base.py): a0_lora_a_weight, a0_lora_b_weight, a0_scaling,"
        " linear_with_products",
    ]
    assert told(compiled, "b") == [
        "b: linear 4 → 3 (Linear), float32",
        "  default (LORA): not adapted: target_modules=['a'] does not name it",
    ]


def test_what_is_merged_or_not_active_is_told() -> None:
    specs = {name: peftc.LoraConfig(r=2, target_modules=["a"]) for name in ("x", "y")}
    compiled = peftc.compile(Two(), specs)
    compiled.merge_adapter(["x"])
    assert told(compiled, "a")[3:] == ["  merged: x"]
    compiled.unmerge_adapter()
    compiled.set_adapter([])
    assert told(compiled, "a")[3:] == ["  none of them is active"]


def test_in_one_graph_of_the_model_the_nodes_are_those_of_the_place() -> None:
    spec = {"target_modules": ["a", "b"]}
    specs = {"one": peftc.LoraConfig(r=2, **spec), "two": peftc.IA3Config(feedforward_modules=[], **spec)}
    compiled = peftc.compile(Two(), specs, capture="symbolic")
    compiled.set_adapter(["one", "two"])
    (lora,), (ia3,) = ([line for line in told(compiled, "b") if f"of '{name}'" in line] for name in specs)
    assert lora.startswith("  from lora of 'one' (a2), LoraLinear.output (lora/base.py): a2_lora_a_weight")
    assert ia3.startswith("  from ia3 of 'two' (a3), IA3Linear.output (rules/ia3.py): a3_ia3_l_value")


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_a_module_saved_whole_says_so_in_its_code(capture: str) -> None:
    compiled = peftc.compile(Two(), peftc.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"]), capture=capture)
    assert told(compiled, "b")[1] == "  default (LORA): trains a copy of it: weight 3×4, bias 3"
    lines = [
        line
        for line in told(compiled, "b")
        if re.match(r"  from modules_to_save of 'default' \(a\d\), SavedModule: b", line)
    ]
    assert len(lines) == 1


def test_the_code_says_where_a_copy_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    compiled = peftc.compile(Two(), peftc.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"]))
    compiled.print_code()
    assert "    # modules_to_save of 'default' (a0), SavedModule\n    base = self.a0.own(" in capsys.readouterr().out


def test_places_that_are_no_ops_of_weights() -> None:
    compiled = peftc.compile(tiny("llama"), peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    first, second, third, fourth = told(compiled, "")
    assert first == "the model: a LlamaForCausalLM, which is no op of the table with a weight"
    assert second.startswith(
        "  default (PROMPT_TUNING): prompt_tuning @embeds adds embedding.weight 3×32; can't be merged: "
    )
    assert third == "  its graph has 12 nodes of the module itself"
    assert fourth.startswith("  from prompt_tuning of 'default' (a0), PromptTuning: ")
    experts = peftc.compile(nn.Sequential(Experts()), peftc.LoraConfig(r=1, target_parameters=["w"]))
    assert told(experts, "0")[0] == "0: a Experts, which is no op of the table with a weight; its weights are 0.w"
    assert told(experts, "0.w")[0] == "0.w: parameter 3 × 2 → 4 (Experts), float32"


def test_what_is_not_there_is_told_with_what_is_near() -> None:
    compiled = peftc.compile(Two(), peftc.LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(peftc.AdapterError, match=r"no module or parameter 'c'"):
        compiled.explain("c")
