"""LoRA's variants with factors of another form, against peft: outputs, gradients, files both ways, merging."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

import peftc
import peftc.peft as served
from tests.support.against import half_as_peft, near, same_as_peft
from tests.support.interchange import perturbed, quietly


class Net(nn.Module):
    """Linears of several sizes, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.down_proj, self.other = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.down_proj(torch.tanh(self.up_proj(x)))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
TARGETS = ["up_proj", "down_proj", "other"]
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": ["down"],
    "target_modules_bd_b": ["up"],
    "nblocks": 2,
    "match_strict": False,
}


def config(variant: str, library: Any = peft, **more: Any) -> Any:
    given: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **more}
    if variant == "bdlora":
        return library.LoraConfig(**given, use_bdlora=library.tuners.lora.config.BdLoraConfig(**BLOCKS))
    return library.LoraConfig(**given, kasa_config=library.tuners.lora.config.KasaConfig(beta=0.5, gamma=0.25))


@pytest.mark.parametrize("variant", ["bdlora", "kasa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_gradients_files_and_merging_are_those_of_peft(variant: str, rslora: bool, tmp_path: Path) -> None:
    ours = same_as_peft(Net(), config(variant, use_rslora=rslora), X, tmp_path)
    served_form = tmp_path / "served"
    ours.save_pretrained(served_form, form="serving")
    again = quietly(peft.PeftModel.from_pretrained, Net(), str(served_form)).eval()
    near(again(X), ours(X), 1e-5, "outputs of peft, from the serving form")


@pytest.mark.parametrize("variant", ["bdlora", "kasa"])
def test_half_precision(variant: str, tmp_path: Path) -> None:
    half_as_peft(Net(), config(variant), X, tmp_path)


def test_a_fresh_one_of_blocks_is_the_base_and_a_strict_one_wants_all_to_be_named() -> None:
    net = Net()
    fields: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    ours = peftc.compile(net, peftc.LoraConfig(**fields, use_bdlora=BLOCKS))
    assert torch.equal(ours(X), net(X))
    assert ours.base.down_proj.lora_A.default.weight.shape == (2, 6)
    assert ours.base.up_proj.lora_B.default.weight.shape == (12, 1)
    with pytest.raises(peftc.NoMatchError, match="or set match_strict=False"):
        peftc.compile(net, peftc.LoraConfig(**fields, use_bdlora={**BLOCKS, "match_strict": True}))
    with pytest.raises(peftc.NoMatchError, match="nblocks=3 of use_bdlora does not divide r=2"):
        peftc.compile(net, peftc.LoraConfig(**fields, use_bdlora={**BLOCKS, "nblocks": 3}))
    with pytest.raises(peftc.SpecError, match=r"both have \['up'\]"):
        peftc.LoraConfig(**fields, use_bdlora={"target_modules_bd_a": ["up"], "target_modules_bd_b": ["up"]})


def test_kasa_starts_as_in_peft_and_its_penalty_is_peft_s(tmp_path: Path) -> None:
    net = Net()
    theirs: Any = quietly(peft.get_peft_model, copy.deepcopy(net), config("kasa")).eval()
    ours = peftc.compile(net, config("kasa").to_dict()).eval()
    near(ours(X), theirs(X), 1e-5, "outputs of a fresh one, whose weights are truncated")
    perturbed(theirs, 1)
    theirs.save_pretrained(tmp_path)
    own = peftc.load(net, tmp_path, is_trainable=True)
    near(own.penalty(), theirs.base_model._get_kasa_loss(), 1e-5, "the penalty")
    with pytest.raises(peftc.NoMatchError, match="would leave nothing of the weight: r=4, its smaller side is 4"):
        peftc.compile(net, peftc.LoraConfig(r=4, target_modules=["other"], kasa_config={}))


def test_qalora_is_what_peft_computes_on_its_quantised_layers(tmp_path: Path) -> None:
    """peft has it there alone; a plain layer has the same algebra."""
    net = Net()
    spec = peftc.LoraConfig(r=2, lora_alpha=6, target_modules=["up_proj"], use_qalora=True, qalora_group_size=4)
    ours = peftc.compile(net, spec).eval()
    assert torch.equal(ours(X), net(X))
    perturbed(ours, 1)
    layer = ours.base.up_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert a.shape == (2, 2)
    theirs: Any = SimpleNamespace(
        lora_A={"d": SimpleNamespace(weight=a)},
        lora_B={"d": SimpleNamespace(weight=b)},
        scaling={"d": 3.0},
        lora_dropout={"d": nn.Identity()},
        qalora_group_size={"d": 4},
        in_features=8,
        training=False,
    )
    expected = QALoraLinearVariant.forward(theirs, active_adapter="d", x=X, result=net.up_proj(X))
    near(layer(X), expected, 1e-5, "outputs")
    y = ours(X)
    ours.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(net, tmp_path)(X), y)
    with ours.merged():
        near(ours(X), y, 1e-5, "outputs after merging")
    with pytest.raises(peftc.NoMatchError, match="qalora_group_size=3 does not divide its 8"):
        peftc.compile(net, spec.model_copy(update={"qalora_group_size": 3}))


def test_scripts_for_peft_use_their_configs(tmp_path: Path) -> None:
    for variant in ("bdlora", "kasa"):
        net = Net()
        model = served.get_peft_model(copy.deepcopy(net), config(variant, served))
        perturbed(model, 1).save_pretrained(tmp_path / variant)
        again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / variant)).eval()
        near(again(X), model(X), 1e-5, "outputs in peft")
    near(model.base_model._get_kasa_loss(), again.base_model._get_kasa_loss(), 1e-5, "the penalty")


def test_variants_exclude_each_other_and_name_what_comes_closest() -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    with pytest.raises(peftc.SpecError, match="use_dora and kasa_config don't go together: leave one of them out"):
        peftc.LoraConfig(**fields, use_dora=True, kasa_config={})
    with pytest.raises(peftc.SpecError, match="use_bdlora needs init_lora_weights=True or False"):
        peftc.LoraConfig(**fields, use_bdlora=BLOCKS, init_lora_weights="pissa")
    for field, said in {
        "velora_config": "gradient_checkpointing_enable",
        "monteclora_config": "lora_dropout",
        "arrow_config": "adapter_names",
        "megatron_config": "tensor parallelism",
    }.items():
        with pytest.raises(peftc.SpecError, match=rf"{field}=.*is not implemented; .*{said}"):
            peftc.LoraConfig(**fields, **{field: {"a": 1}})
