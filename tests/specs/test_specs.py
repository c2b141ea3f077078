"""Specs: PEFT's files load, wrong fields are one clear error."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import peftc
import peftc.peft

# What peft 0.3 to 0.21 wrote for one and the same adapter; fields came, went and were renamed.
HISTORICAL: dict[str, dict[str, Any]] = {
    "0.3": {
        "base_model_name_or_path": "facebook/opt-350m",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "0.2": {"enable_lora": None, "merge_weights": False},
    "0.5": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core", "rank_pattern": {}},
    "0.10": {"use_dora": False, "use_rslora": False, "layer_replication": None, "alpha_pattern": {}},
    "0.15": {"corda_config": None, "eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None, "use_qalora": False},
}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "string rank": ({"r": "8"}, r"r: got '8'.*did you mean 8"),
    "zero rank": ({"r": 0}, r"r: got 0; .*greater than 0"),
    "negative rank": ({"r": -2}, r"r: got -2"),
    "boolean rank": ({"r": True}, r"r: got True"),
    "rank in a pattern": ({"rank_pattern": {"q": 0}}, r"rank_pattern\.q: got 0"),
    "bias": ({"bias": "lora-only"}, r"bias: got 'lora-only'.*nearest: 'lora_only'"),
    "task": ({"task_type": "CAUSALLM"}, r"task_type: got 'CAUSALLM'.*nearest: 'CAUSAL_LM'"),
    "field": ({"target_module": ["q"]}, r"target_module: no such field\. Nearest: 'target_modules'"),
    "dropout": ({"lora_dropout": 1.5}, r"lora_dropout: got 1\.5"),
    "targets": ({"target_modules": 3}, r"target_modules: got 3"),
    "a target": ({"target_modules": ["q", 3]}, r"target_modules\.1: got 3"),
    "a text for names": ({"modules_to_save": "head"}, r"modules_to_save: got 'head'; give a list .*\['head'\]"),
    "regex": ({"target_modules": "a("}, r"target_modules: 'a\(' is not a regular expression"),
    "pattern": ({"rank_pattern": {"a(": 2}}, r"rank_pattern: 'a\(' is not a regular expression"),
    "init": ({"init_lora_weights": "pisa"}, r"init_lora_weights: got 'pisa'.*gaussian, olora, pissa"),
    "layers and regex": ({"target_modules": "q", "layers_to_transform": [1]}, r"layers_to_transform contradicts"),
    "pattern alone": ({"layers_pattern": "layers"}, r"layers_pattern needs layers_to_transform"),
    "velora": ({"velora_config": {"scale": 1}}, r"velora_config=.*is not implemented"),
    "method": ({"peft_type": "IA3"}, r"peft_type: got 'IA3'"),
}


def test_null_turns_off_what_is_on_as_in_peft() -> None:
    """Files have it; peft goes by the truth of the value, so that its adapter starts random."""
    config = {"peft_type": "LORA", "target_modules": ["0"], "init_lora_weights": None}
    spec = peftc.load_spec(config)
    assert spec.to_dict()["init_lora_weights"] is False
    assert peftc.peft.LoraConfig(**config, r=2).init_lora_weights is None
    model = nn.Sequential(nn.Linear(4, 4))
    ours = peftc.compile(model, spec).base
    face = peftc.peft.get_peft_model(model, peftc.peft.LoraConfig(**config)).base_model.model
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=None)).base_model.model
    assert all(one[0].lora_B["default"].weight.any() for one in (ours, face, theirs))
    assert peftc.load_spec({"peft_type": "IA3", "init_ia3_weights": None}) == peftc.IA3Config(init_ia3_weights=False)
    with pytest.raises(peftc.SpecError, match="use_rslora: got None"):
        peftc.LoraConfig(use_rslora=None)


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_wrong_fields_are_one_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftc.SpecError, match=message):
        peftc.LoraConfig(**fields)


def test_ia3_feedforward_modules_must_be_targets() -> None:
    with pytest.raises(peftc.SpecError, match="feedforward_modules: 'wo' is not in target_modules"):
        peftc.IA3Config(target_modules=["k"], feedforward_modules=["wo"])


@pytest.mark.parametrize("version", HISTORICAL)
def test_files_of_real_versions_load(version: str, tmp_path: Path) -> None:
    data = {**HISTORICAL["0.3"], **HISTORICAL[version]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    if version == "0.2":
        with pytest.warns(UserWarning, match="'merge_weights'"):
            spec = peftc.load_spec(tmp_path)
    else:
        spec = peftc.load_spec(tmp_path)
    assert isinstance(spec, peftc.LoraConfig)
    assert (spec.r, spec.lora_alpha, spec.target_modules) == (16, 32, ("q_proj", "v_proj"))
    assert {**spec.to_dict(), **data} == spec.to_dict()


def test_specs_are_peft_configs_both_ways(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(
        r=4,
        target_modules=["q", "v"],
        lora_alpha=3,
        bias="lora_only",
        rank_pattern={"q": 2},
        task_type=peft.TaskType.SEQ_CLS,
        layers_to_transform=[1, 2],
        init_lora_weights="gaussian",
    )
    spec = peftc.load_spec(theirs)
    theirs.save_pretrained(tmp_path)
    # peft keeps the targets in a set, so their order is any.
    written = peftc.load_spec(tmp_path / "adapter_config.json").to_dict()
    assert {**written, "target_modules": sorted(written["target_modules"])} == spec.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(spec.to_dict()))
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == theirs.to_dict()


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_specs_load_from_files(suffix: str, tmp_path: Path) -> None:
    text = '{"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": []}'
    if suffix == "yaml":
        text = "peft_type: IA3\ntarget_modules: [k]\nfeedforward_modules: []\n"
    file = tmp_path / f"spec.{suffix}"
    file.write_text(text)
    assert peftc.load_spec(file) == peftc.IA3Config(target_modules=["k"], feedforward_modules=[])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        ("{}", "peft_type is missing; valid are "),
        ('{"peft_type": "LOAR"}', r"'LOAR' is not known.*Nearest: 'LORA'"),
        ('{"peft_type": "LORA", "r": "8"}', r"adapter_config\.json: LoraConfig: r: got '8'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(peftc.SpecError, match=message):
        peftc.load_spec(tmp_path)


def test_binary_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(peftc.SpecError, match="no such file"):
        peftc.load_spec(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(peftc.SpecError, match="can't be read as text"):
        peftc.load_spec(tmp_path)


@pytest.mark.parametrize("source", [3, None, ["LORA"]])
def test_what_is_no_spec(source: Any) -> None:
    with pytest.raises(peftc.SpecError, match="is not a spec"):
        peftc.load_spec(source)


def test_unknown_keys_are_kept_and_reported(tmp_path: Path) -> None:
    data = {"peft_type": "LORA", "target_modules": ["q"], "from_the_future": {"a": [1]}}
    with pytest.warns(UserWarning, match="'from_the_future'"):
        spec = peftc.load_spec(data)
    assert spec.unknown_keys == ("from_the_future",)
    assert spec.to_dict()["from_the_future"] == {"a": [1]}


def test_scaling_and_patterns() -> None:
    spec = peftc.LoraConfig(r=4, lora_alpha=8, rank_pattern={"q": 16, ".*q": 2}, alpha_pattern={r"1\..*": 32})
    assert spec.rank_for("layers.1.q") == 16
    assert spec.rank_for("layers.1.xq") == 2
    assert spec.scaling_for("layers.0.v") == 2
    assert spec.scaling_for("layers.1.v") == 8
    assert peftc.LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling_for("v") == 4


def test_specs_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        peftc.LoraConfig().r = 3  # pyright: ignore


def test_no_layers_to_transform_are_all() -> None:
    for empty in ([], ()):
        assert peftc.LoraConfig(target_modules=["q"], layers_to_transform=empty).layers_to_transform is None
    with pytest.raises(peftc.SpecError, match="layers_pattern needs layers_to_transform"):
        peftc.LoraConfig(target_modules=["q"], layers_to_transform=[], layers_pattern="h")


def test_an_empty_layers_pattern_is_none() -> None:
    spec = peftc.LoraConfig(target_modules=["q"], layers_pattern="")
    assert spec == peftc.LoraConfig(target_modules=["q"])
    with pytest.raises(peftc.SpecError, match="at least 1 character"):
        peftc.LoraConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=[""])
