"""The modules a spec selects on real architectures are those peft selects, and the adapted models agree."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from peft.utils import constants

import peftc
from peftc.architectures import families
from peftc.registry import spec_classes
from tests.support.compare import FLOAT64, SEVERAL_LAYERS, assert_same_function, randomise, to_peft
from tests.support.models import ARCHITECTURES, inputs_for, tiny

LISTS = {
    "llama": ["q_proj", "mlp.down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "mlp.c_proj", "wte"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "SelfAttention.v", "wo"],
    "vit": ["query", "attention.q_proj", "projection", "v_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "whisper": ["k_proj", "fc1", "conv1"],
}
REGEXES = {
    "llama": r".*\.[02]\..*(q|up)_proj",
    "gpt2": r"transformer\.h\.1\..*c_(attn|fc)",
    "bert": r".*layer\.0.*(query|intermediate\.dense)",
    "t5": r".*decoder.*(SelfAttention|EncDecAttention)\.(q|v)$",
    "vit": r".*layer.*\.(key|value|k_proj|v_proj)",
    "mixtral": r".*v_proj",
    "whisper": r".*decoder\.layers\.\d+\.encoder_attn\.(q|v)_proj",
}


def _matched_by_peft(model: Any, config: Any) -> set[str]:
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    return set(wrapped.base_model.targeted_module_names)


def _matched(model: Any, spec: Any) -> set[str]:
    plan = peftc.plan(model, spec)
    assert not [miss for miss in plan.misses if miss.error], plan.misses
    return {edit.site for edit in plan.edits}


def _present(model: Any, names: list[str]) -> list[str]:
    modules = [fqn for fqn, _ in model.named_modules()]
    return [name for name in names if any(f".{fqn}".endswith(f".{name}") for fqn in modules)]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("target", ["list", "regex", "all-linear", "none"])
def test_matched_modules_equal_peft(model_type: str, target: str) -> None:
    model = tiny(model_type)
    if target == "none" and model_type not in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        with pytest.raises(ValueError, match="target_modules"):
            peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig())
        with pytest.raises(peftc.NoMatchError, match="no default for model_type"):
            peftc.plan(model, peftc.LoraConfig())
        return
    targets = {
        "list": _present(model, LISTS[model_type]),
        "regex": REGEXES[model_type],
        "all-linear": "all-linear",
        "none": None,
    }[target]
    ours = _matched(model, peftc.LoraConfig(target_modules=targets))
    assert ours
    if (model_type, target) == ("mixtral", "none"):
        # peft's own default fails on transformers 5, whose experts are one parameter; its table still says q and v.
        targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]
    assert ours == _matched_by_peft(model, peft.LoraConfig(target_modules=targets))


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in ("vit", "whisper", "mixtral")])
def test_ia3_defaults_equal_peft(model_type: str) -> None:
    model = tiny(model_type)
    ours = peftc.plan(model, peftc.IA3Config())
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config())
    assert {edit.site for edit in ours.edits} == set(theirs.base_model.targeted_module_names)
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters() if "ia3_l" in name}
    assert {f"base_model.model.{e.site}.ia3_l.default": e.params[0].shape for e in ours.edits} == shapes


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": r".*layers\.1.*"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"modules_to_save": ["mlp"]},
    ],
    ids=str,
)
def test_filters_equal_peft(fields: dict[str, Any]) -> None:
    model = tiny("llama")
    common = {"target_modules": ["q_proj", "up_proj"], **fields}
    plan = peftc.plan(model, peftc.LoraConfig(**common))
    assert {e.site for e in plan.edits if e.rule.name == "lora"} == _matched_by_peft(model, peft.LoraConfig(**common))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_adapted_architectures_equal_peft(model_type: str, tmp_path: Path) -> None:
    """All linear layers at once, in float64: the graphs carry attention, caches and heads along unchanged."""
    # Mixtral's experts run a grouped matrix product that has no float64.
    dtype = torch.float32 if model_type == "mixtral" else torch.float64
    model = tiny(model_type).to(dtype)
    compiled = peftc.compile(model, peftc.LoraConfig(r=2, target_modules="all-linear"))
    randomise(compiled)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_for(model_type).items()}
    tolerance = SEVERAL_LAYERS if dtype == torch.float32 else FLOAT64
    assert_same_function(compiled, to_peft(compiled, model, tmp_path), inputs, tolerance)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_ia3_on_architectures_equals_peft(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    compiled = peftc.compile(model, peftc.IA3Config())
    randomise(compiled)
    assert_same_function(compiled, to_peft(compiled, model, tmp_path), inputs_for(model_type), SEVERAL_LAYERS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_generation_equals_peft(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules="all-linear"))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    ids = inputs_for(model_type)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = compiled.generate(input_ids=ids, **options)
    assert torch.equal(ours, theirs.generate(input_ids=ids, **options))
    assert not torch.equal(ours, model.generate(input_ids=ids, **options))


# Names of peft's tables by `peft_type`.
TABLES = {
    "LORA": "LORA",
    "IA3": "IA3",
    "VERA": "VERA",
    "LN_TUNING": "LNTUNING",
    "ADALORA": "ADALORA",
    "FOURIERFT": "FOURIERFT",
    "RANDLORA": "RANDLORA",
    "SHIRA": "SHIRA",
    "VBLORA": "VBLORA",
    "PVERA": "PVERA",
    "FROD": "FROD",
    "ADAMSS": "ADAMSS",
}
# The names that falcon had before, which peft's table for norms lacks.
OTHERS = {("RefinedWeb", "LN_TUNING"), ("RefinedWebModel", "LN_TUNING")}


def test_defaults_of_every_model_type_equal_peft() -> None:
    """The architecture files hold what peft's tables hold, and every type of those."""
    ours = families()
    theirs = {
        method: getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
        for method, name in TABLES.items()
    }
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    # What peft has for llava is a container, an embedding and a head beside norms: to be named by who wants it.
    assert set(ours) == set().union(*theirs.values()) - {"llava"}
    for model_type, family in ours.items():
        for method, targets in theirs.items():
            default = family.defaults_for(spec_classes()[method])
            found = None if default is None else default["target_modules"]
            found = list(found) if isinstance(found, tuple) else found
            assert found == targets.get(model_type) or (model_type, method) in OTHERS, (model_type, method)
        if "IA3" in family.defaults:
            assert list(family.defaults["IA3"].get("feedforward_modules", ())) == feedforward[model_type]


def test_architecture_files_are_small() -> None:
    import peftc_rules.architectures

    folder = Path(peftc_rules.architectures.__file__).parent
    sizes = {file.name: len(yaml.safe_load(file.read_text())["model_types"]) for file in folder.glob("*.yaml")}
    assert len(sizes) > 20
    assert max(sizes.values()) <= 3
