"""Files that the first version wrote still load, say the same and give the same function."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftc
from tests.support.checkpoints import hashes
from tests.support.models import tiny

FILES = Path(__file__).parent.parent / "golden" / "version1"
IDS = torch.arange(3, 10)[None]


def model() -> Any:
    torch.manual_seed(0)
    return tiny("llama").eval()


@pytest.mark.parametrize("name", ["lora", "ia3", "p_tuning"])
def test_adapters_with_their_manifests_and_encoders_load(name: str) -> None:
    expected = load_file(FILES / "logits.safetensors")[name]
    torch.testing.assert_close(peftc.load(model(), FILES / name)(input_ids=IDS).logits, expected)
    trained = peftc.load(model(), FILES / name, is_trainable=True).eval()
    torch.testing.assert_close(trained(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "ia3", "p_tuning"])
def test_plans_are_read_and_applied(name: str) -> None:
    plan = peftc.Plan.from_json((FILES / name / "plan.json").read_text())
    compiled = peftc.compile(model(), plan)
    assert compiled.plan.to_json() == plan.to_json()
    assert peftc.Plan.from_json(plan.to_json()) == plan
    assert peftc.plan(model(), plan.adapters["default"]).edits == plan.edits


def test_a_plan_of_heads_and_biases_is_read() -> None:
    plan = peftc.Plan.from_json((FILES / "plan_bert.json").read_text())
    torch.manual_seed(0)
    made = peftc.plan(tiny("bert", "AutoModelForSequenceClassification"), dict(plan.adapters))
    assert made == plan


def test_a_merged_checkpoint_gives_the_base_again(tmp_path: Path) -> None:
    shutil.copytree(FILES / "merged", tmp_path / "merged")
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "base")
    assert hashes(tmp_path / "base") == hashes(FILES / "base")
    peftc.merge_checkpoint(FILES / "base", FILES / "lora", tmp_path / "again", undo=True)
    again, first = hashes(tmp_path / "again"), hashes(FILES / "merged")
    assert {name: again[name] for name in first if name.endswith("safetensors")} == {
        name: value for name, value in first.items() if name.endswith("safetensors")
    }
