"""What scripts in the wild do with models of peft, each done with peft and with peftc.peft alike."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc.peft
from tests.support.scripts import base

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
BOTH = pytest.mark.parametrize("lib", [peft, peftc.peft], ids=["peft", "peftc"])


def lora(lib: Any, **more: Any) -> Any:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return lib.LoraConfig(**{**fields, **more})


def adapted(lib: Any, given: Any = None, **more: Any) -> Any:
    return lib.get_peft_model(base() if given is None else given, lora(lib, **more))


def learning(model: Any, part: str = "lora_") -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and part in name]


def dtypes(model: Any, name: str) -> set[torch.dtype]:
    return {p.dtype for key, p in model.named_parameters() if f".{name}." in key}


@BOTH
def test_targets_that_match_nothing_are_an_error_whatever_else_is_saved(lib: Any) -> None:
    with pytest.raises(ValueError, match=r"nope|target"):
        adapted(lib, target_modules=["nope"], modules_to_save=["lm_head"])
    classifier = base("LlamaForSequenceClassification", pad_token_id=0)
    with pytest.raises(ValueError, match=r"nope|target"):
        adapted(lib, classifier, target_modules=["nope"], task_type="SEQ_CLS")


@BOTH
@pytest.mark.parametrize("targets", [["lm_head"], []], ids=["those saved", "none"])
def test_adapters_of_nothing_but_saved_modules_are_an_error_that_says_so(lib: Any, targets: list[str]) -> None:
    with pytest.raises(ValueError, match=r"(?s)target|adapts no module") as caught:
        adapted(lib, target_modules=targets, modules_to_save=["lm_head"])
    if lib is peftc.peft:
        said = "in modules_to_save" if targets else "it adapts no module"
        assert said in str(caught.value)


@BOTH
def test_set_adapter_lets_train_what_a_script_has_frozen(lib: Any) -> None:
    model = adapted(lib)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.set_adapter("default")
    assert len(learning(model)) == 4
    model.set_adapter("default", inference_mode=True)
    assert not learning(model)


@BOTH
def test_loading_more_adapters(lib: Any, tmp_path: Path) -> None:
    adapted(lib, lora_dropout=0.1).save_pretrained(tmp_path)
    model = adapted(lib, lora_dropout=0.1).train()
    model.load_adapter(str(tmp_path), "b", is_trainable=True)
    assert learning(model, ".b.")
    assert model.training
    model.load_adapter(str(tmp_path), "c")
    assert not learning(model, ".c.")
    assert not any(module.training for module in model.modules())


@BOTH
def test_a_new_adapter_drops_whatever_mode_the_base_is_in(lib: Any) -> None:
    model = adapted(lib, base().eval(), lora_dropout=0.5, init_lora_weights=False)
    assert model.training
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@BOTH
def test_dtypes_of_further_adapters_are_asked_for_one_by_one(lib: Any, tmp_path: Path) -> None:
    model = lib.get_peft_model(base().to(torch.bfloat16), lora(lib), autocast_adapter_dtype=False)
    model.add_adapter("b", lora(lib))
    model.add_adapter("c", lora(lib), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "d")
    found = [dtypes(model, name) for name in ("default", "b", "c", "d")]
    assert found == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}, {torch.float32}]


@BOTH
def test_what_a_model_says_of_itself(lib: Any) -> None:
    model = adapted(lib)
    assert model.peft_type == "LORA"
    layers = [model.base_model.get_submodule(status.name) for status in model.get_layer_status()]
    assert len(layers) == 2
    assert all("default" in layer.lora_A for layer in layers)
    assert [s.name for s in lib.get_layer_status(model)] == [s.name for s in model.get_layer_status()]


@BOTH
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generating_needs_a_name_for_every_prompt(lib: Any, options: dict[str, Any]) -> None:
    model = adapted(lib).eval()
    for names in (["default"], ["default"] * 4):
        for given in ({"input_ids": IDS}, {"inputs_embeds": model.get_input_embeddings()(IDS)}):
            with pytest.raises(ValueError, match=r"adapter.?names"):
                model.generate(**given, adapter_names=names, max_new_tokens=2, **options)
    made = model.generate(input_ids=IDS, adapter_names=["default", "__base__"], max_new_tokens=2, **options)
    assert len(made) == 2


@BOTH
def test_heads_are_in_the_config(lib: Any) -> None:
    model = adapted(lib, base("LlamaForSequenceClassification", pad_token_id=0), task_type="SEQ_CLS")
    assert sorted(model.peft_config["default"].modules_to_save) == ["classifier", "score"]


@BOTH
def test_options_of_other_loaders_are_let_pass(lib: Any, tmp_path: Path) -> None:
    adapted(lib).save_pretrained(tmp_path)
    more = {"torch_dtype": torch.float16, "trust_remote_code": True, "device_map": {"": "cpu"}}
    assert lib.PeftModel.from_pretrained(base(), str(tmp_path), **more).active_adapter == "default"


@BOTH
def test_adapters_that_are_not_active_are_merged(lib: Any) -> None:
    model = adapted(lib, init_lora_weights=False)
    model.add_adapter("b", lora(lib, init_lora_weights=False))
    model.set_adapter("b")
    b = model(IDS).logits
    model.set_adapter("default")
    default = model(IDS).logits
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(IDS).logits, b, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).logits, default, rtol=1e-4, atol=1e-5)
    assert model.active_adapter == "default"
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(merged(IDS).logits, b, rtol=1e-4, atol=1e-5)


@BOTH
def test_more_around_a_merge(lib: Any) -> None:
    model = adapted(lib, init_lora_weights=False)
    model.merge_adapter()
    model.merge_adapter()
    model.unmerge_adapter()
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert not torch.allclose(merged(IDS).logits, base()(IDS).logits)
    assert model.merge_and_unload() is merged
    assert torch.equal(model(IDS).logits, merged(IDS).logits)
    model.print_trainable_parameters()


@BOTH
def test_a_cell_is_run_again(lib: Any) -> None:
    given = base()
    lib.get_peft_model(given, lora(lib))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(given, lora(lib, r=2))
    assert model.peft_config["default"].r == 2
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {2}


@BOTH
def test_factors_are_linears_to_call(lib: Any) -> None:
    model = adapted(lib, init_lora_weights=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert (a.in_features, a.out_features, b.out_features) == (layer.in_features, 4, layer.out_features)
    own = torch.nn.functional.linear(x, layer.get_delta_weight("default"))
    torch.testing.assert_close(b(a(x)) * layer.scaling["default"], own, rtol=1e-4, atol=1e-5)
    assert (layer.use_rslora["default"], layer.fan_in_fan_out) == (False, False)


@BOTH
def test_pickles_of_adapters_are_read(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    loaded = lib.PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@BOTH
def test_defaults_that_are_looked_at(lib: Any) -> None:
    config = lib.LoraConfig()
    found = (config.peft_version, config.loftq_config, config.megatron_core, config.qalora_group_size)
    assert found == ("0.21.2", {}, "megatron.core", 16)
    assert lib.PromptTuningConfig(num_virtual_tokens=3).prompt_tuning_init.value == "RANDOM"
    assert lib.LoraConfig(rank_pattern=None, inference_mode=None).r == 8


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", "all-linear"),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", ["q_proj", "gate"]),
        ("mixtral", "all-linear"),
    ],
    ids=str,
)
def test_targets_that_are_fused_experts_now_are_the_experts(kind: str, targets: Any, tmp_path: Path) -> None:
    cls = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}[kind]
    more = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    models = [
        lib.get_peft_model(base(cls, kind, **more), lib.LoraConfig(r=2, target_modules=targets))
        for lib in (peft, peftc.peft)
    ]
    theirs, ours = (model.get_nb_trainable_parameters()[0] for model in models)
    assert theirs == ours
    models[1].save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(cls, kind, **more), str(tmp_path))
    assert sum(p.numel() for name, p in again.named_parameters() if "lora_" in name) == ours


def test_loading_onto_a_model_with_adapters_keeps_them(tmp_path: Path) -> None:
    adapted(peftc.peft).save_pretrained(tmp_path)
    model = adapted(peftc.peft)
    again = peftc.peft.PeftModel.from_pretrained(model, str(tmp_path), adapter_name="y")
    assert sorted(again.peft_config) == ["default", "y"]
    assert again.active_adapter == "y"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: layer.lora_A.__setitem__("default", nn.Linear(32, 4)), "copy values into"),
        (lambda layer: setattr(layer, "base_layer", nn.Linear(32, 32)), "Exchange modules first"),
        (lambda layer: layer.lora_B["default"].register_forward_hook(lambda *_: None), "never called"),
    ],
    ids=["a factor", "the base layer", "a hook"],
)
def test_changes_of_a_layer_that_would_have_no_effect_are_refused(change: Any, said: str) -> None:
    model = adapted(peftc.peft)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = model(IDS).logits
    with pytest.raises(peftc.AdapterError, match=said):
        change(layer)
    assert torch.equal(model(IDS).logits, before)


def test_assigning_scalings_is_live() -> None:
    model = adapted(peftc.peft, init_lora_weights=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling = {"default": 0.0}
    assert layer.scaling == {"default": 0.0}
    other = model.base_model.model.model.layers[0].self_attn.v_proj
    other.scaling["default"] = 0.0
    torch.testing.assert_close(model(IDS).logits, base()(IDS).logits)


def test_what_a_pickle_of_a_part_lacks_is_said() -> None:
    model = adapted(peftc.peft)
    layer = pickle.loads(pickle.dumps(model.base_model.model.model.layers[0].self_attn.q_proj))
    with pytest.raises(peftc.AdapterError, match="pickle the PeftModel, not"):
        _ = layer.scaling
