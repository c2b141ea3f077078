"""Files and state dicts go between peft and peftc both ways, for every method and every form peft has written them in."""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import peftc
from tests.support.compare import assert_close
from tests.support.interchange import ALL, CASES, PROMPTS, SERVED, Bench, config_in, lora, perturbed, quietly, write
from tests.support.models import tiny
from tests.support.releases import EARLY, OLDEST, REFUSED, RELEASES, config_of


def assert_equal_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys, and the same bits under each."""
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("name", "fields"), ALL.values(), ids=ALL)
def test_peftc_reads_what_peft_writes(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(name, fields)
    theirs = bench.theirs()
    expected = bench.output(theirs)
    bench.assert_adapts(expected)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = bench.assert_in_peftc(tmp_path / "theirs", expected)
    loaded.save_pretrained(tmp_path / "ours")
    bench.assert_in_peft(tmp_path / "ours", expected)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")


@pytest.mark.parametrize(("name", "fields"), ALL.values(), ids=ALL)
def test_peft_reads_what_peftc_writes(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(name, fields)
    compiled = bench.ours()
    expected = bench.output(compiled)
    bench.assert_adapts(expected)
    compiled.save_pretrained(tmp_path)
    bench.assert_in_peft(tmp_path, expected)


@pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)
def test_state_dicts_are_the_same_both_ways(name: str, fields: dict[str, Any]) -> None:
    bench = Bench(name, fields)
    theirs, ours = bench.theirs(), bench.ours()
    given = quietly(peft.get_peft_model_state_dict, theirs)
    result = peftc.set_peft_model_state_dict(ours, given)
    assert result.fits
    assert not result.renamed
    assert_equal_tensors(peftc.get_peft_model_state_dict(ours), given)
    assert_close(bench.output(ours), bench.output(theirs), "in peftc", bench.tolerance)
    other = bench.ours(9)
    given = peftc.get_peft_model_state_dict(other)
    assert not peft.set_peft_model_state_dict(theirs, given).unexpected_keys
    assert_equal_tensors(quietly(peft.get_peft_model_state_dict, theirs), given)
    assert_close(bench.output(other), bench.output(theirs), "in peft", bench.tolerance)


@pytest.mark.parametrize(("name", "fields"), PROMPTS.values(), ids=PROMPTS)
def test_state_dicts_of_prompts_are_the_same_both_ways(name: str, fields: dict[str, Any]) -> None:
    bench = Bench(name, fields)
    bare = Bench(name, {**fields, "inference_mode": True})  # Holds the rows themselves, as a state dict does.
    theirs, ours = bench.theirs(), peftc.compile(bare.model, bare.fields).eval()
    given = peft.get_peft_model_state_dict(theirs)
    assert peftc.set_peft_model_state_dict(ours, given).fits
    assert_equal_tensors(peftc.get_peft_model_state_dict(ours), given)
    assert_close(bench.output(ours), bench.output(theirs), "in peftc", bench.tolerance)
    ours, theirs = bench.ours(), peft.get_peft_model(copy.deepcopy(bare.model), bare.config()).eval()
    given = peftc.get_peft_model_state_dict(ours)
    peft.set_peft_model_state_dict(theirs, given)
    assert_equal_tensors(peft.get_peft_model_state_dict(theirs), given)
    assert_close(bench.output(ours), bench.output(theirs), "in peft", bench.tolerance)


SEVERAL = {
    "default": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "second": lora(r=2, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
    "third": lora(r=3, target_modules=["up_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("names", [list(SEVERAL), ["second", "third"]], ids=" ".join)
def test_several_adapters_in_subfolders(names: list[str], tmp_path: Path) -> None:
    bench = Bench("llama", SEVERAL[names[0]])
    configs = {name: Bench("llama", SEVERAL[name]).config() for name in names}
    theirs = peft.get_peft_model(copy.deepcopy(bench.model), configs[names[0]], names[0])
    for name in names[1:]:
        theirs.add_adapter(name, configs[name])
    expected: dict[str, Tensor] = {}
    for seed, name in enumerate(names):
        theirs.set_adapter(name)
        expected[name] = bench.output(perturbed(theirs, seed))
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = _loaded_by(peftc.load, bench.model, tmp_path / "theirs", names)
    ours.save_pretrained(tmp_path / "ours")
    again = _loaded_by(peft.PeftModel.from_pretrained, copy.deepcopy(bench.model), tmp_path / "ours", names)
    for name in names:
        ours.set_adapter(name)
        again.set_adapter(name)
        assert_close(bench.output(ours), expected[name], f"{name} in peftc", bench.tolerance)
        assert_close(bench.output(again.eval()), expected[name], f"{name} in peft", bench.tolerance)
        own = "." if name == "default" else name
        keys = [set(load_file(tmp_path / by / own / "adapter_model.safetensors")) for by in ("ours", "theirs")]
        assert keys[0] == keys[1]


def _loaded_by(load: Any, model: Any, folder: Path, names: list[str]) -> Any:
    """Every adapter of `folder` in one model. `default` lies at the top, others in subfolders."""
    where = {name: folder if name == "default" else folder / name for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = load(model, where[names[0]], names[0])
        for name in names[1:]:
            loaded.load_adapter(where[name], name)
    return loaded


@pytest.mark.parametrize("save", [True, "auto"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["embed_tokens"]), ("tied llama", ["embed_tokens"]), ("llama", ["q_proj"]), ("gpt2", ["c_attn"])],
    ids=str,
)
def test_embeddings_saved_along(name: str, targets: list[str], save: Any, tmp_path: Path) -> None:
    bench = Bench(name, lora(target_modules=targets))
    theirs = bench.theirs()
    whole = save is True or targets == ["embed_tokens"]
    if whole:
        with torch.no_grad():
            theirs.get_base_model().get_input_embeddings().weight.mul_(1.5)
    expected = bench.output(theirs)
    quietly(theirs.save_pretrained, tmp_path / "theirs", save_embedding_layers=save)
    loaded = quietly(bench.assert_in_peftc, tmp_path / "theirs", expected)
    loaded.save_pretrained(tmp_path / "ours", save_embedding_layers=save)
    quietly(bench.assert_in_peft, tmp_path / "ours", expected)
    ours, given = (load_file(tmp_path / by / "adapter_model.safetensors") for by in ("ours", "theirs"))
    assert any("lora" not in key for key in given) == whole
    # Beside a targeted embedding peft leaves the other one out, even if told to save both.
    if targets == ["embed_tokens"]:
        ours.pop("base_model.model.lm_head.weight", None)
    assert_equal_tensors(ours, given)


def test_a_resized_vocabulary_is_saved_along(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    bench = Bench("llama", lora(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base")))
    bench.model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval().double()
    bench.model.resize_token_embeddings(70)
    theirs, ours = bench.theirs(), bench.ours()
    expected = bench.output(theirs)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    bench.assert_in_peftc(tmp_path / "theirs", expected)
    ours.save_pretrained(tmp_path / "ours")
    bench.assert_in_peft(tmp_path / "ours", bench.output(ours))
    found, given = (load_file(tmp_path / by / "adapter_model.safetensors") for by in ("ours", "theirs"))
    assert set(found) == set(given)
    assert given["base_model.model.lm_head.weight"].shape[0] == 70


@pytest.mark.parametrize(("name", "fields", "rank"), SERVED.values(), ids=SERVED)
def test_the_serving_form_gives_peft_equal_outputs(
    name: str, fields: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    bench = Bench(name, fields)
    compiled = bench.ours()
    expected = bench.output(compiled)
    bench.assert_adapts(expected)
    compiled.save_pretrained(tmp_path, form="serving")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert [config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora")] == [{}, {}, False]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.shape[0 if "_A" in key else 1] for key, value in tensors.items()} == {rank}
    bench.assert_in_peft(tmp_path, expected)
    bench.assert_in_peftc(tmp_path, expected)


@pytest.mark.parametrize("release", RELEASES)
def test_configs_of_every_release(release: str, tmp_path: Path) -> None:
    config = config_of(release)
    bench = Bench("llama", {**OLDEST, **RELEASES[release][1], "inference_mode": False})
    theirs = bench.theirs()
    expected = bench.output(theirs)
    bench.assert_adapts(expected)
    pickled = release in ("0.2", "0.3", "0.5", "0.6")
    write(tmp_path, config, quietly(peft.get_peft_model_state_dict, theirs), pickled)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bench.assert_in_peftc(tmp_path, expected, allow_pickle=pickled)
    unknown = [str(item.message) for item in told if issubclass(item.category, UserWarning)]
    assert len(unknown) == (release == "0.2")
    assert all("kept as they are: 'merge_weights'" in text for text in unknown)
    bench.assert_in_peft(tmp_path, expected)


@pytest.mark.parametrize(("name", "config"), EARLY.values(), ids=EARLY)
def test_early_configs_of_other_methods(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    # The text made a prompt's start, with a tokenizer that nobody needs afterwards.
    start = {key for key in config if key.startswith(("prompt_tuning_init", "tokenizer"))}
    made = {key: value for key, value in config.items() if key not in start}
    bench = Bench(name, {**made, "inference_mode": False})
    theirs = bench.theirs()
    expected = bench.output(theirs)
    bench.assert_adapts(expected)
    write(tmp_path, config, peft.get_peft_model_state_dict(theirs), pickled=True)
    bench.assert_in_peftc(tmp_path, expected, allow_pickle=True)
    bench.assert_in_peft(tmp_path, expected)


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_would_change_the_result_are_refused(field: str, tmp_path: Path) -> None:
    bench = Bench("llama", {**OLDEST, "inference_mode": False})
    write(tmp_path, OLDEST, quietly(peft.get_peft_model_state_dict, bench.theirs()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**OLDEST, field: REFUSED[field]}))
    with pytest.raises(peftc.SpecError, match=field):
        peftc.load(bench.model, tmp_path)


def test_fields_of_the_future_are_told_and_kept(tmp_path: Path) -> None:
    bench = Bench("llama", lora(target_modules=["q_proj"]))
    theirs = bench.theirs()
    quietly(theirs.save_pretrained, tmp_path)
    config = {**json.loads((tmp_path / "adapter_config.json").read_text()), "from_the_future": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="'from_the_future'"):
        loaded = bench.assert_in_peftc(tmp_path, bench.output(theirs))
    loaded.save_pretrained(tmp_path / "again")
    assert config_in(tmp_path / "again")["from_the_future"] == 3
    bench.assert_in_peft(tmp_path / "again", bench.output(theirs))


# Today's spelling of a key, and an older one; peft itself no longer reads these.
SPELLINGS: dict[str, tuple[str, str]] = {
    "a wrapper's name": ("model.head.", "model.head.modules_to_save.default."),
    "a wrapper": ("model.head.", "model.head.modules_to_save."),
    "biases before 0.6": ("base_layer.bias", "bias"),
}


@pytest.mark.parametrize(("now", "then"), SPELLINGS.values(), ids=SPELLINGS)
def test_older_keys(now: str, then: str, tmp_path: Path) -> None:
    bench = Bench("layers", lora(target_modules=["linear", "conv1d"], bias="lora_only", modules_to_save=["head"]))
    theirs = bench.theirs()
    tensors = peft.get_peft_model_state_dict(theirs)
    renamed = {key.replace(now, then): value for key, value in tensors.items()}
    assert set(renamed) != set(tensors)
    theirs.save_pretrained(tmp_path)
    write(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()), renamed)
    loaded = bench.assert_in_peftc(tmp_path, bench.output(theirs))
    assert_equal_tensors(peftc.get_peft_model_state_dict(loaded), tensors)
    compiled = bench.ours()
    result = peftc.set_peft_model_state_dict(compiled, renamed)
    assert result.renamed == {key: key.replace(now, then) for key in tensors if now in key}


def test_an_embedding_under_its_name_before_0_6(tmp_path: Path) -> None:
    bench = Bench("llama", lora(target_modules=["embed_tokens", "q_proj"]))
    theirs = bench.theirs()
    with torch.no_grad():
        theirs.get_base_model().get_input_embeddings().weight.mul_(1.5)
    quietly(theirs.save_pretrained, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    plain = {key.replace("base_layer.weight", "weight"): value for key, value in tensors.items()}
    assert set(plain) != set(tensors)
    write(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()), plain)
    with pytest.warns(UserWarning, match="the adapter brings its own"):
        bench.assert_in_peftc(tmp_path, bench.output(theirs))


def test_defaults_that_say_nothing_of_the_targets_are_not_saved(tmp_path: Path) -> None:
    """peft saves them, and refuses its own file then."""
    base = tiny("llama")
    compiled = peftc.compile(base, peftc.IA3Config(target_modules=["q_proj", "v_proj"]))
    compiled.save_pretrained(tmp_path)
    assert config_in(tmp_path)["feedforward_modules"] == set()
    assert peftc.load(base, tmp_path).peft_config["default"] == peftc.load_spec(tmp_path)
    peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    kept = peftc.compile(base, peftc.IA3Config(target_modules=["q_proj", "down_proj"]))
    kept.save_pretrained(tmp_path)
    assert config_in(tmp_path)["feedforward_modules"] == {"down_proj"}
