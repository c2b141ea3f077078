"""SHiRA against peft: outputs, gradients, files both ways, merging, the same places."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftc
import peftc.peft
from tests.support.methods import ROWS, Linears, assert_near, compare, in_peft

TARGETS = ["l", "n"]  # peft has it for nn.Linear only.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "seed": {"random_seed": 5, "r": 1},
    "random": {"init_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_files(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.ShiraConfig(**{"r": 2, "target_modules": TARGETS, **VARIANTS[variant]})
    theirs, ours = compare(Linears(), ROWS, config, tmp_path, moved=0.5)
    fresh = peftc.compile(Linears(), peftc.load_spec(config)).adapter_state_dict()
    for site in TARGETS:
        drawn = getattr(theirs.base_model.model, site).shira_indices["default"]
        assert torch.equal(fresh[f"base_model.model.{site}.shira_indices"], drawn)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert saved["base_model.model.l.shira_indices"].dtype == torch.int32
    assert [p.requires_grad for name, p in ours.named_parameters() if "indices" in name] == [False, False]


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.ShiraConfig(r=2, target_modules=TARGETS)
    compare(Linears().bfloat16(), ROWS.bfloat16(), config, tmp_path, within=1e-5, merged=4e-2, moved=0.5)


def test_places_of_another_mask_come_with_the_file_and_are_not_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Linears()
    config = peft.ShiraConfig(r=2, target_modules=TARGETS, random_seed=9)
    model = in_peft(net, config, 0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask_type": "mine", "random_seed": None}))
    assert_near(peftc.load(net, tmp_path)(ROWS), model(ROWS), 2e-6, "outputs")
    with pytest.raises(peftc.SpecError, match="mask_type='mine': only 'random' places can be drawn"):
        peftc.compile(net, peftc.ShiraConfig(r=2, mask_type="mine", target_modules=TARGETS))


def test_a_scale_is_that_of_the_change() -> None:
    torch.manual_seed(0)
    net = Linears()
    outputs: list[Any] = []
    for lib in (peft, peftc.peft):
        model: Any = lib.get_peft_model(copy.deepcopy(net), lib.ShiraConfig(r=2, target_modules=TARGETS)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "shira_weight" in name:
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
        for site in TARGETS:
            getattr(model.base_model.model, site).set_scale("default", 0.5)
        outputs.append(model(ROWS))
    assert_near(outputs[1], outputs[0], 2e-6, "outputs")


def test_more_entries_than_there_are_are_refused() -> None:
    with pytest.raises(peftc.NoMatchError, match="its weight has 48 entries, fewer than the 56 of r=4"):
        peftc.compile(Linears(), peftc.ShiraConfig(r=4, target_modules=["l"]))
