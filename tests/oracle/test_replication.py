"""layer_replication against peft: a deeper model of shared weights, with adapters of its own at every layer."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
import peftc.peft as served
from tests.support.against import near, same_gradients
from tests.support.interchange import perturbed, quietly
from tests.support.models import tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot

IDS = token_ids(2, 7, 64)
RANGES = [[0, 2], [1, 3], [1, 2]]
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query"], "gpt2": ["c_attn"], "qwen3": ["q_proj", "o_proj"]}


def fields(family: str) -> dict[str, Any]:
    return {"r": 3, "target_modules": TARGETS[family], "layer_replication": RANGES}


def output(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options)[0]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_gradients_and_files_are_those_of_peft(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = tiny(family, num_hidden_layers=3).eval()
    before = snapshot(net)
    config = peft.LoraConfig(**fields(family))
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftc.load(net, tmp_path / "theirs", is_trainable=True).eval()
    near(output(ours), output(theirs), 1e-5, "outputs")
    same_gradients(ours, theirs, IDS, 1e-4, of=lambda output: output[0], apart=True)
    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(output(again), output(ours), 1e-5, "outputs of peft, from files of peftc")
    assert_unchanged(net, before)
    assert net.config.num_hidden_layers == 3
    assert len({id(p) for p in net.parameters()}) == len(
        {id(p) for n, p in ours.named_parameters() if "lora_" not in n}
    )


def test_it_generates_with_a_cache_also_where_the_config_says_something_of_every_layer() -> None:
    """peft's model fails there, whose config says it of the layers that were."""
    torch.manual_seed(0)
    net = tiny("qwen3", num_hidden_layers=3).eval()
    ours = perturbed(peftc.compile(net, peftc.LoraConfig(**fields("qwen3"))), 1)
    assert ours.base.config.num_hidden_layers == 5
    assert len(ours.base.config.layer_types) == 5
    cached = ours.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, ours.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False))
    with ours.disable_adapter():
        bare = output(ours)
    assert not torch.allclose(bare, output(net))
    plain = ours.unload()
    near(output(plain), bare, 1e-6, "outputs without the adapter")


def test_merging_wants_weights_of_their_own() -> None:
    net = tiny("llama").eval()
    ours = perturbed(peftc.compile(net, peftc.LoraConfig(**fields("llama"))), 1)
    y, before = output(ours), {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(peftc.MergeError, match="untie=True"):
        ours.merge_adapter()
    with ours.merged(untie=True):
        near(output(ours), y, 1e-5, "outputs after merging")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    plain = ours.merge_and_unload(untie=True)
    near(output(plain), y, 1e-5, "outputs of the plain model")


def test_adapters_of_one_model_agree_on_its_layers(tmp_path: Path) -> None:
    net = tiny("llama").eval()
    spec = peftc.LoraConfig(**fields("llama"))
    ours = peftc.compile(net, {"a": spec, "b": peftc.LoraConfig(r=2, target_modules=["layers.4.self_attn.q_proj"])})
    ours.add_adapter("c", spec)
    ours.save_pretrained(tmp_path, selected_adapters=["c"])
    ours.load_adapter(tmp_path / "c", "d")
    other = peftc.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 1]])
    with pytest.raises(peftc.SpecError, match=r"replicated already, by \[\[0, 2\], \[1, 3\], \[1, 2\]\]"):
        ours.add_adapter("e", other)
    plain = peftc.compile(net, peftc.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(peftc.AdapterError, match="is for a model with other layers than this one"):
        plain.add_adapter("c", spec)
    assert list(plain.plan.adapters) == ["default"]


def test_in_place_the_model_itself_is_deeper_and_stays_as_it_was_if_that_fails(tmp_path: Path) -> None:
    net = tiny("llama").eval()
    before = snapshot(net)
    bad = peftc.LoraConfig(**{**fields("llama"), "target_modules": ["no_such"]})
    with pytest.raises(peftc.NoMatchError):
        peftc.compile(net, bad, inplace=True)
    assert_unchanged(net, before)
    assert net.config.num_hidden_layers == 3
    twin = copy.deepcopy(net)
    model = perturbed(served.get_peft_model(net, served.LoraConfig(**fields("llama"))), 1)
    assert model.get_base_model() is net
    assert len(net.model.layers) == 5
    model.save_pretrained(tmp_path)
    for library in (peft, served):
        again = quietly(library.PeftModel.from_pretrained, copy.deepcopy(twin), str(tmp_path)).eval()
        near(output(again), output(model), 1e-5, f"outputs in {library.__name__}")


def test_what_can_not_be_replicated_is_refused(tmp_path: Path) -> None:
    def spec(ranges: Any, **more: Any) -> peftc.LoraConfig:
        return peftc.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=ranges, **more)

    with pytest.raises(peftc.SpecError, match=r"\[2, 4\] is no range \[start, end\) of the 3 layers in model.layers"):
        peftc.compile(tiny("llama"), spec([[0, 1], [2, 4]]))
    with pytest.raises(
        peftc.SpecError, match=r"this BartForConditionalGeneration has \['model.encoder.layers', 'model.dec"
    ):
        peftc.compile(tiny("bart"), spec([[0, 1]]))
    with pytest.raises(peftc.SpecError, match="this Linear has none"):
        peftc.compile(nn.Linear(2, 2), spec([[0, 1]]))
    with pytest.raises(peftc.SpecError, match="replicated layers share: leave one out"):
        spec([[0, 1]], bias="all")
    with pytest.raises(peftc.SpecError, match="layer_replication"):
        spec([[0, 1, 2]])
    net = tiny("llama").eval()
    net.save_pretrained(tmp_path / "base")
    peftc.compile(net, spec([[0, 2], [1, 3]])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(peftc.AdapterError, match="nor merged on disk"):
        peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    # In memory, it can be.
    loaded = peftc.load(net, tmp_path / "adapter")
    y = output(loaded)
    near(output(loaded.merge_and_unload(untie=True)), y, 1e-5, "outputs of the merged one")
