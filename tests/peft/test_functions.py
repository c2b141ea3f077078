"""PEFT's functions, each called on peft and on peftc.peft alike."""

import copy
import dataclasses
import gc
import pickle
import weakref
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import peft.functional
import peft.helpers
import peft.utils.hotswap
import pytest
import torch
from torch import nn

import peftc
import peftc.peft
from peftc.peft.layers import BaseTunerLayer
from tests.support.scripts import base, filled

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
BOTH = pytest.mark.parametrize("lib", [peft, peftc.peft], ids=["peft", "peftc"])


def adapted(lib: Any, **more: Any) -> Any:
    config = lib.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **more})
    return filled(lib.get_peft_model(base(), config))


@BOTH
def test_base_state_dicts(lib: Any) -> None:
    model = adapted(lib)
    plain = base().state_dict()
    model.merge_adapter()
    model.unmerge_adapter()
    own = lib.get_base_model_state_dict(model)
    assert set(own) == set(plain)
    assert all(torch.allclose(own[name], plain[name], atol=1e-6) for name in plain)
    lib.set_base_model_state_dict(model, {name: value + 1 for name, value in plain.items()})
    assert torch.equal(lib.get_base_model_state_dict(model)["lm_head.weight"], plain["lm_head.weight"] + 1)


def test_the_base_state_is_that_from_before_a_merge() -> None:
    model = adapted(peftc.peft)
    before = {name: value.clone() for name, value in peftc.peft.get_base_model_state_dict(model).items()}
    model.merge_adapter()
    now = peftc.peft.get_base_model_state_dict(model)
    assert all(torch.equal(now[name], value) for name, value in before.items())


@BOTH
def test_casting(lib: Any) -> None:
    model = lib.get_peft_model(base().to(torch.bfloat16), lib.LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    kept = lib.get_peft_model(
        base().to(torch.bfloat16), lib.LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    assert {p.dtype for n, p in kept.named_parameters() if "lora_" in n} == {torch.bfloat16}
    injected = lib.inject_adapter_in_model(lib.LoraConfig(target_modules=["q_proj"]), base().to(torch.bfloat16))
    assert {p.dtype for n, p in injected.named_parameters() if "lora_" in n} == {torch.bfloat16}
    single = adapted(lib)
    lib.cast_mixed_precision_params(single, torch.bfloat16)
    assert {p.dtype for n, p in single.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in single.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    with pytest.raises((RuntimeError, TypeError), match="bfloat16"):
        lib.cast_mixed_precision_params(single, "bfloat16")


@BOTH
def test_preparing_for_training_on_few_bits(lib: Any) -> None:
    model = base().to(torch.float16)
    assert lib.prepare_model_for_kbit_training(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.is_gradient_checkpointing


@BOTH
def test_weights_of_a_folder(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    model.save_pretrained(tmp_path)
    weights = lib.load_peft_weights(str(tmp_path), device="cpu")
    assert set(weights) == set(lib.get_peft_model_state_dict(model))
    other = lib.get_peft_model(base(), lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    lib.set_peft_model_state_dict(other, weights)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(RuntimeError):
        lib.set_peft_model_state_dict(other, {key: value[:1] for key, value in weights.items()})


@BOTH
def test_models_from_the_adapter_alone(lib: Any, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    given = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = lib.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = filled(lib.get_peft_model(given, config)).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    # PEFT's AutoPeftModel wants no task.
    for cls in (lib.AutoPeftModelForCausalLM, peftc.peft.AutoPeftModel):
        loaded = cls.from_pretrained(str(tmp_path / "adapter"))
        assert type(loaded).__name__ == "PeftModelForCausalLM"
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@BOTH
def test_models_from_an_adapter_for_another_task_are_refused(lib: Any, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    for task in ("CAUSAL_LM", None):
        adapter = str(tmp_path / str(task))
        given = type(base()).from_pretrained(tmp_path / "base")
        lib.get_peft_model(given, lib.LoraConfig(task_type=task, target_modules=["q_proj"])).save_pretrained(adapter)
        if task is not None:
            with pytest.raises(ValueError, match=r"CausalLM|CAUSAL_LM"):
                lib.AutoPeftModelForSequenceClassification.from_pretrained(adapter)
        assert type(lib.AutoPeftModelForCausalLM.from_pretrained(adapter)).__name__ == "PeftModelForCausalLM"


def test_options_for_the_adapter_are_the_adapter_s(tmp_path: Path) -> None:
    """The advice of the error, `verify="files"`, would be an argument of the base."""
    base().save_pretrained(tmp_path / "base")
    given = type(base()).from_pretrained(tmp_path / "base")
    config = peftc.peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peftc.peft.get_peft_model(given, config).save_pretrained(tmp_path / "adapter")
    other = base()
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(peftc.CheckpointError, match="verify='files'"):
        peftc.peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = peftc.peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", verify="files")
    assert torch.equal(loaded.get_input_embeddings().weight, other.get_input_embeddings().weight)


@BOTH
def test_fields_of_configs_are_no_options_of_loading(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    model.save_pretrained(tmp_path)
    told = pytest.warns(UserWarning, match="lora_alpha: no effect here") if lib is not peft else nullcontext()
    with told:
        loaded = lib.PeftModel.from_pretrained(base(), str(tmp_path), lora_alpha=64)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    other = base()
    with pytest.raises((ValueError, TypeError), match=r"expected a PeftConfig, got a dict|must be a PeftConfig"):
        lib.PeftModel.from_pretrained(other, str(tmp_path), config={"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert not any("lora" in name for name, _ in other.named_parameters())


@BOTH
def test_configs(lib: Any, tmp_path: Path) -> None:
    config = lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.1)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, r=8).r == 8
    assert {"r", "lora_alpha", "target_modules", "use_dora"} <= {field.name for field in dataclasses.fields(config)}
    config.base_model_name_or_path = "somewhere"
    config.save_pretrained(str(tmp_path))
    again = lib.PeftConfig.from_pretrained(str(tmp_path))
    assert type(again).__name__ == "LoraConfig"
    assert (again.r, again.lora_dropout, again.base_model_name_or_path) == (4, 0.1, "somewhere")
    assert again.target_modules == config.target_modules
    assert lib.LoraConfig.from_pretrained(str(tmp_path)).peft_type == lib.PeftType.LORA == "LORA"
    assert lib.PeftConfig.from_peft_type(peft_type="IA3").peft_type.value == "IA3"
    assert lib.get_peft_config({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}).is_prompt_learning
    assert isinstance(lib.PrefixTuningConfig(num_virtual_tokens=3), lib.PromptLearningConfig)
    assert lib.PEFT_TYPE_TO_CONFIG_MAPPING[lib.PeftType.LORA] is lib.LoraConfig


@BOTH
def test_hot_swapping(lib: Any, tmp_path: Path) -> None:
    hotswap = import_module(f"{lib.__name__}.utils.hotswap")
    one, two = adapted(lib), filled(adapted(lib), 2)
    two.save_pretrained(tmp_path)
    assert not torch.allclose(one(IDS).logits, two(IDS).logits)
    hotswap.hotswap_adapter(one, str(tmp_path), adapter_name="default")
    torch.testing.assert_close(one(IDS).logits, two(IDS).logits)
    with pytest.raises(ValueError, match=r"rslora|rs_lora|use_rslora"):
        hotswap.check_hotswap_configs_compatible(
            lib.LoraConfig(r=4, target_modules=["q_proj"]),
            lib.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True),
        )


@BOTH
def test_hot_swapping_takes_other_ranks_scalings_and_fewer_modules(lib: Any, tmp_path: Path) -> None:
    hotswap = import_module(f"{lib.__name__}.utils.hotswap")
    model = adapted(lib, r=2, lora_alpha=3).eval()
    before = model(IDS).logits
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(IDS).logits, before)
    others: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 9},
        {"r": 8, "lora_alpha": 2, "target_modules": ["q_proj"]},
    ]
    if lib is peftc.peft:  # peft takes r for the scaling where rank_pattern says another rank.
        others.append({"r": 2, "rank_pattern": {"v_proj": 5}})
    for seed, fields in enumerate(others):
        other = filled(adapted(lib, **fields), seed + 2).eval()
        other.save_pretrained(tmp_path / str(seed))
        hotswap.hotswap_adapter(model, str(tmp_path / str(seed)), adapter_name="default")
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
        assert not torch.allclose(model(IDS).logits, before)
    if lib is peftc.peft:  # peft saves tensors of the padded rank with the config of another.
        model.save_pretrained(tmp_path / "own")
        for other_lib in (peft, peftc.peft):
            again = other_lib.PeftModel.from_pretrained(base(), tmp_path / "own").eval()
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_a_hot_swap_compiles_nothing_anew_and_keeps_what_is_active_and_learns(tmp_path: Path) -> None:
    torch.compiler.reset()
    model, graphs = adapted(peftc.peft, r=2), list[int]()
    model.add_adapter("other", peftc.peft.LoraConfig(r=3, target_modules=["q_proj"]))
    peftc.peft.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert model.active_adapters == ["default"]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".default." in name for name in learning)

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    fast = torch.compile(model.eval(), backend=count, fullgraph=True)
    fast(IDS)
    assert len(graphs) == 1
    for r in (2, 4, 8):
        other = filled(adapted(peftc.peft, r=r, lora_alpha=r * r), r).eval()
        other.save_pretrained(tmp_path / str(r))
        peftc.peft.hotswap_adapter(fast, tmp_path / str(r), "default")
        torch.testing.assert_close(fast(IDS).logits, other(IDS).logits)
    assert len(graphs) == 1
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match=r"prepare it before torch\.compile"):
        peftc.peft.prepare_model_for_compiled_hotswap(fast, target_rank=8)
    with pytest.warns(UserWarning, match=r"prepare it before torch\.compile"):
        peftc.peft.prepare_model_for_compiled_hotswap(fast, target_rank=8, check_compiled="warn")
    config = peftc.peft.LoraConfig(r=2, rank_pattern={"q": 3})
    peftc.peft.prepare_model_for_compiled_hotswap(model, target_rank=8, config={"one": config})
    assert (config.r, config.rank_pattern) == (8, {"q": 8})
    with pytest.raises(ValueError, match="target_rank=4: adapter 'other' has rank 8"):
        peftc.peft.prepare_model_for_compiled_hotswap(model, target_rank=4)


def test_hot_swapping_of_a_method_without_ranks(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    one, two = (filled(peftc.peft.get_peft_model(base(), peftc.peft.IA3Config(**fields)), n) for n in (1, 2))
    two.save_pretrained(tmp_path / "all")
    peftc.peft.get_peft_model(base(), peftc.peft.IA3Config(**{**fields, "target_modules": ["k_proj"]})).save_pretrained(
        tmp_path / "fewer"
    )
    peftc.peft.hotswap_adapter(one, tmp_path / "all", "default")
    torch.testing.assert_close(one.eval()(IDS).logits, two.eval()(IDS).logits)
    with pytest.raises(peftc.CheckpointError, match="v_proj"):
        peftc.peft.hotswap_adapter(one, tmp_path / "fewer", "default")


def test_hot_swapping_what_does_not_fit_changes_nothing_and_the_advice_holds(tmp_path: Path) -> None:
    model = adapted(peftc.peft)
    before, names = model(IDS).logits, dict(model.named_parameters())
    adapted(peftc.peft, use_dora=True).save_pretrained(tmp_path / "dora")
    adapted(peftc.peft, r=2, target_modules=["q_proj", "k_proj"]).save_pretrained(tmp_path / "more")
    with pytest.raises(peftc.AdapterError, match=r"differ in use_dora .*Load the new one beside the old"):
        peftc.peft.hotswap_adapter(model, tmp_path / "dora", "default")
    with pytest.raises(peftc.CheckpointError, match="k_proj"):
        peftc.peft.hotswap_adapter(model, tmp_path / "more", "default")
    dora = adapted(peftc.peft, use_dora=True)
    adapted(peftc.peft, use_dora=True, target_modules=["q_proj"]).save_pretrained(tmp_path / "fewer")
    with pytest.raises(peftc.CheckpointError, match="magnitude"):  # Zero would be no weight at all.
        peftc.peft.hotswap_adapter(dora, tmp_path / "fewer", "default")
    assert torch.equal(model(IDS).logits, before)
    assert names.keys() == dict(model.named_parameters()).keys()
    model.load_adapter(tmp_path / "dora", "new")
    model.set_adapter("new")
    assert not torch.equal(model(IDS).logits, before)


@BOTH
def test_rescaling_for_a_while(lib: Any) -> None:
    model = adapted(lib).eval()
    full, none = model(IDS).logits, base().eval()(IDS).logits
    with import_module(f"{lib.__name__}.helpers").rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(IDS).logits, none)
    torch.testing.assert_close(model(IDS).logits, full)


@BOTH
def test_tuner_models_made_directly(lib: Any) -> None:
    model = base()
    tuner = lib.LoraModel(model, lib.LoraConfig(r=4, target_modules=["q_proj"]), "default")
    assert [name.replace(".base_layer", "") for name, _ in tuner.named_parameters()][1].startswith(
        "model.model.layers.0"
    )
    assert tuner.targeted_module_names == ["model.layers.0.self_attn.q_proj"]
    assert tuner.active_adapters == ["default"]
    assert tuner.config is model.config


@BOTH
def test_adapters_are_injected_by_the_name_of_their_config(lib: Any) -> None:
    model = adapted(lib)
    tuner, before = model.base_model, model(IDS).logits
    with pytest.raises((KeyError, peftc.AdapterError), match="second"):
        tuner.inject_adapter(tuner.model, "second")
    tuner.peft_config["second"] = lib.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    tuner.inject_adapter(tuner.model, "second")
    assert torch.equal(model(IDS).logits, before)
    assert tuner.active_adapters == ["default"]
    model.set_adapter("second")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "k_proj"
    }
    assert not torch.equal(model(IDS).logits, before)


@BOTH
def test_a_module_of_ones_own(lib: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.Embedding(5, 5))
    model = lib.get_peft_model(module, lib.LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False))
    assert type(model).__name__ == "PeftModel"
    assert [isinstance(child, BaseTunerLayer | peft.tuners.tuners_utils.BaseTunerLayer) for child in module] == [
        True, False, False, True,
    ]  # fmt: skip
    unloaded = model.unload()
    assert type(unloaded[0]) is nn.Linear


@BOTH
def test_names_of_adapters_in_parameter_names_are_exchanged(lib: Any) -> None:
    """As trl's GRPO trainer does for its reference."""
    model = adapted(lib)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    before = model(IDS).logits
    model.set_adapter("ref")
    torch.testing.assert_close(model(IDS).logits, before)


@BOTH
def test_models_are_let_go(lib: Any) -> None:
    model = adapted(lib)
    gone = weakref.ref(model.get_base_model())
    model(IDS)
    del model
    gc.collect()
    assert gone() is None


def test_using_a_model_that_was_unloaded_says_so() -> None:
    model = adapted(peftc.peft)
    model.unload()
    with pytest.raises(peftc.AdapterError, match=r"has no adapters \(any more"):
        model.set_adapter("default")


def test_making_a_layer_alone_says_what_to_do() -> None:
    from peftc.peft.tuners.lora import Linear

    with pytest.raises(peftc.AdapterError, match="adapt the model that has the module in it"):
        Linear(nn.Linear(3, 3), "default", r=2)


def test_a_second_config_adds_an_adapter_and_says_so() -> None:
    model = adapted(peftc.peft)
    with pytest.warns(UserWarning, match="has adapters already; they stay"):
        again = peftc.peft.get_peft_model(model, peftc.peft.LoraConfig(target_modules=["o_proj"]), "second")
    assert sorted(again.peft_config) == ["default", "second"]
    assert again.active_adapter == "second"


def test_layers_told_to_merge_one_by_one_merge_together() -> None:
    model = adapted(peftc.peft)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.weight.clone() for layer in layers]
    before = model(IDS).logits
    for layer in layers:
        layer.merge()
    assert all(layer.merged for layer in layers)
    assert not any(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    torch.testing.assert_close(model(IDS).logits, before)
    for layer in layers:
        layer.unmerge()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    assert torch.equal(model(IDS).logits, before)
