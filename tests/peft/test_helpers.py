"""Helpers that scripts call, on peft and on peftc.peft alike: starts again, keys by patterns, pickles, names, injecting."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc
import peftc.peft
from tests.support.scripts import base, filled

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
BOTH = pytest.mark.parametrize("lib", [peft, peftc.peft], ids=["peft", "peftc"])
LIBS = (peft, peftc.peft)


def adapted(lib: Any, **fields: Any) -> Any:
    config = lib.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    return filled(lib.get_peft_model(base(), config)).eval()


@BOTH
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_factors_start_again(lib: Any, start: Any) -> None:
    model = adapted(lib, target_modules=["q_proj", "embed_tokens"])
    before = model(IDS).logits
    for module in model.modules():
        if isinstance(module, lib.tuners.lora.LoraLayer):
            module.reset_lora_parameters("default", start)
            module.reset_lora_parameters("unknown", start)
    assert torch.equal(model(IDS).logits, before) is (start is False)
    with model.disable_adapter():
        plain = model(IDS).logits
    assert torch.allclose(model(IDS).logits, plain, atol=1e-6) is (start is not False)
    layer = next(m for m in model.modules() if isinstance(m, lib.tuners.lora.Linear))
    deviation = float(layer.lora_A["default"].weight.std())
    assert (0.15 < deviation < 0.35) is (start == "gaussian")
    with pytest.raises(ValueError, match="init_lora_weights"):
        layer.reset_lora_parameters("default", "pissa")


def test_what_is_no_model_or_no_config_is_refused_before_anything_is_adapted() -> None:
    model, config = base(), {"peft_type": "LORA", "target_modules": ["q_proj"]}
    made = peftc.peft.get_peft_config(config)
    for adapt in (
        lambda: peftc.peft.get_peft_model(model, config),
        lambda: peftc.peft.inject_adapter_in_model(config, model),
        lambda: peftc.peft.LoraModel(model, {"default": config}, "default"),
    ):
        with pytest.raises(TypeError, match="got a dict: get_peft_config makes one of it"):
            adapt()
        assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    with pytest.raises(TypeError, match="expected a module to adapt, got a dict"):
        peftc.peft.get_peft_model({}, made)
    adapter = peftc.peft.get_peft_model(model, made)  # The advice.
    with pytest.raises(peftc.AdapterError, match="'default' exists already"):
        adapter.add_adapter("default", made)


@BOTH
def test_factors_look_like_linears(lib: Any) -> None:
    plain, biased = (adapted(lib, lora_bias=biased) for biased in (False, True))
    layers = [next(m for m in model.modules() if isinstance(m, lib.tuners.lora.Linear)) for model in (plain, biased)]
    a, b = layers[0].lora_A["default"], layers[0].lora_B["default"]
    assert (a.in_features, a.out_features, a.bias, b.bias) == (32, 4, None, None)
    assert layers[1].lora_B["default"].bias.shape == (layers[1].lora_B["default"].out_features,)
    assert not any(name.endswith("lora_A.default.bias") for name in biased.state_dict())


@BOTH
def test_keys_by_patterns(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    model.save_pretrained(str(tmp_path))
    from safetensors.torch import load_file, save_file

    file = str(tmp_path / "adapter_model.safetensors")
    old = {key.replace(".self_attn.", ".attention."): value for key, value in load_file(file).items()}
    save_file(old, file)
    mapping = {r"layers\.(\d+)\.attention\.": r"layers.\1.self_attn.", "layers": "never reached"}
    loaded = lib.PeftModel.from_pretrained(base(), str(tmp_path), key_mapping=mapping)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.load_adapter(str(tmp_path), "b", key_mapping=mapping)
    loaded.set_adapter("b")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    keys = lib.load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping)
    assert set(keys) == set(lib.get_peft_model_state_dict(model))


def test_patterns_that_can_not_be(tmp_path: Path) -> None:
    adapted(peftc.peft).save_pretrained(tmp_path)
    with pytest.raises(peftc.CheckpointError, match="is not of regular expressions"):
        peftc.load(base(), tmp_path, key_mapping={"(": ""})
    with pytest.raises(peftc.CheckpointError, match="give texts by regular expression"):
        peftc.load(base(), tmp_path, key_mapping=["layers"])  # type: ignore[arg-type]
    with pytest.raises(peftc.CheckpointError, match=r"gives two tensors the name .*make its patterns narrower"):
        peftc.load(base(), tmp_path, key_mapping={".*": "x"})


@BOTH
def test_pickles(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    if lib is peftc.peft:
        model.save_pretrained(str(tmp_path))  # What was there is not read in its place.
        with torch.no_grad():
            filled(model, seed=2)
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    for one in LIBS:
        read = one.PeftModel.from_pretrained(base(), str(tmp_path))
        torch.testing.assert_close(read(IDS).logits, model(IDS).logits)


@BOTH
@pytest.mark.parametrize("name", ["my adapter", "user/adapter", "v1:é+(2)"])
def test_names_of_adapters(lib: Any, name: str, tmp_path: Path) -> None:
    config = lib.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = filled(lib.get_peft_model(base(), config, adapter_name=name)).eval()
    y = model(IDS).logits
    model.save_pretrained(str(tmp_path))
    for one in LIBS:
        read = one.PeftModel.from_pretrained(base(), str(tmp_path / name), adapter_name=name)
        torch.testing.assert_close(read(IDS).logits, y)
    model.add_adapter("other one", config)
    model.set_adapter("other one")
    model.set_adapter(name)
    torch.testing.assert_close(model(IDS, adapter_names=[name, "other one"]).logits[:1], y[:1])
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)


def test_a_name_with_a_slash_is_no_name_of_a_file(tmp_path: Path) -> None:
    compiled = peftc.compile(base(), peftc.LoraConfig(target_modules=["q_proj"]), "user/adapter")
    with pytest.raises(peftc.ExportError, match="can't have a name with a slash; load it under another name"):
        compiled.export(tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()
    with pytest.raises(peftc.ExportError, match="inputs: got a list; give tensors by name"):
        compiled.export(tmp_path / "out", to="pt2", inputs=[IDS])  # type: ignore[arg-type]
    compiled.save_pretrained(tmp_path)
    again = peftc.load(base(), tmp_path / "user/adapter", "adapter")
    again.export(tmp_path / "out", to="mlx")
    assert (tmp_path / "out").exists()


@BOTH
def test_injecting_what_a_state_dict_has(lib: Any) -> None:
    source = adapted(lib, target_modules=["q_proj"])
    state = {k.removeprefix("base_model.model."): v for k, v in lib.get_peft_model_state_dict(source).items()}
    config = lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.inject_adapter_in_model(config, base(), state_dict=state)
    lib.set_peft_model_state_dict(model, state)
    assert set(lib.get_peft_model_state_dict(model)) == set(state)
    assert torch.equal(model(IDS).logits, source(IDS).logits)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_a_state_dict_of_something_else_is_refused() -> None:
    config = peftc.peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = base()
    with pytest.raises(peftc.AdapterError, match="no key is of LORA"):
        peftc.peft.inject_adapter_in_model(config, model, state_dict={"weight": torch.zeros(1)})
    with pytest.raises(peftc.AdapterError, match=r"'blocks\.0' is no module"):
        peftc.peft.inject_adapter_in_model(config, model, state_dict={"blocks.0.lora_A.weight": torch.zeros(1)})
    peftc.peft.inject_adapter_in_model(config, model)  # The advice, on a model that is as it was.


@BOTH
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weights_becomes_plain_lora(lib: Any, start: str, tmp_path: Path) -> None:
    model = lib.get_peft_model(
        base(), lib.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    ).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    for one in LIBS:
        read = one.PeftModel.from_pretrained(base(), str(tmp_path / "plain"))
        torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
        assert read.peft_config["default"].r == 8
        assert read.peft_config["default"].init_lora_weights is True


def test_the_weight_of_a_linear_as_a_parameter_beside_other_targets(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]}
    theirs = filled(peft.get_peft_model(base(), peft.LoraConfig(**fields))).eval()
    ours = filled(peftc.peft.get_peft_model(base(), peftc.peft.LoraConfig(**fields))).eval()
    assert set(peftc.peft.get_peft_model_state_dict(ours)) == set(peft.get_peft_model_state_dict(theirs))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(str(tmp_path / "ours"))
    for folder, model in (("theirs", theirs), ("ours", ours)):
        for one in LIBS:
            read = one.PeftModel.from_pretrained(base(), str(tmp_path / folder))
            torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(peftc.NoMatchError, match="is of shape"):
        peftc.compile(base(), peftc.LoraConfig(target_modules=[], target_parameters=["input_layernorm.weight"]))


@BOTH
def test_mismatched_sizes_can_be_ignored(lib: Any, tmp_path: Path) -> None:
    model = adapted(lib)
    model.save_pretrained(tmp_path)
    config = lib.PeftConfig.from_pretrained(str(tmp_path))
    config.rank_pattern = {"q_proj": 2}
    with pytest.raises(RuntimeError, match=r"size mismatch|mis-shaped"):
        lib.PeftModel.from_pretrained(base(), str(tmp_path), config=config)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = lib.PeftModel.from_pretrained(base(), str(tmp_path), config=config, ignore_mismatched_sizes=True)
    weights, expected = lib.get_peft_model_state_dict(loaded), lib.get_peft_model_state_dict(model)
    fitting = [key for key in expected if "v_proj" in key]
    assert fitting
    assert all(torch.equal(weights[key], expected[key]) for key in fitting)
    assert all(not value.any() for key, value in weights.items() if "q_proj.lora_B" in key)


class Sizes(nn.Module):
    """A module of each kind that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.turned = Conv1D(4, 6)
        self.conv = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.linear = nn.Linear(8, 3)


def test_adapted_modules_know_their_sizes() -> None:
    sizes: list[Any] = []
    for lib in LIBS:
        names = [name for name, _ in Sizes().named_children()]
        plain = lib.get_peft_model(Sizes(), lib.LoraConfig(r=2, target_modules=names)).base_model.model
        chosen = {"target_modules": ["turned", "linear"], "feedforward_modules": ["linear"]}
        scaled = lib.get_peft_model(Sizes(), lib.IA3Config(**chosen)).base_model.model
        sizes.append([(getattr(plain, name).in_features, getattr(plain, name).out_features) for name in names])
        for layer in (scaled.turned, scaled.linear):
            sizes[-1].append((layer.in_features, layer.out_features, layer.is_feedforward))
    assert sizes[0] == sizes[1]


SPECS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_configs_at_every_door(name: str, tmp_path: Path) -> None:
    spec, config = getattr(peftc, name)(**SPECS[name]), getattr(peftc.peft, name)(**SPECS[name])
    expected = peftc.peft.get_peft_model(base(), config)
    made = {
        "get": peftc.peft.get_peft_model(base(), spec, revision="v1"),
        "class": peftc.peft.PeftModelForCausalLM(base(), spec),
        "add": peftc.peft.get_peft_model(base(), config, "first"),
    }
    made["add"].add_adapter("default", spec)
    made["add"].set_adapter("default")
    made["add"].delete_adapter("first")
    made["get"].save_pretrained(tmp_path)
    made["load"] = peftc.peft.PeftModel.from_pretrained(base(), tmp_path, config=spec)
    if not config.is_prompt_learning:
        made["tuner"] = peftc.peft.LoraModel(base(), spec)
        made["injected"] = peftc.peft.inject_adapter_in_model(spec, base())
    for door, model in made.items():
        own = model.peft_config["default"]
        assert type(own) is type(config), door
        own.base_model_name_or_path = "user/base"
        if isinstance(model, peftc.peft.PeftModel):
            assert type(model) is type(expected), door
            assert model.state_dict().keys() == expected.state_dict().keys(), door
    assert made["get"].peft_config["default"].revision == "v1"
