"""`inspect`, `preflight`, `convert`, `combine`, `rules`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc as library
from peftc import PromptSpec, registry
from peftc.graph.sites import WeightSite
from peftc.specs.base import plain
from tests.support.adapters import EVERY_METHOD, perturb
from tests.support.command import peftc
from tests.support.models import llama, model_of, token_ids
from tests.support.pages import parsed, text_of

pytestmark = pytest.mark.usefixtures("here")


def changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter of the model changes each weight by, in float64: from merging it."""
    base = llama().double()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = library.load(base, folder, autocast_adapter_dtype=False, verify="files").merge_and_unload()
    return {name.removesuffix(".weight"): value - before[name] for name, value in merged.state_dict().items()}


def test_what_an_adapter_has_and_how_much_it_changes() -> None:
    found = peftc("inspect", "adapter", "--json").json
    tensors = load_file("adapter/adapter_model.safetensors")
    assert (found["method"], found["task"], found["integrity"]) == (
        "LORA", "CAUSAL_LM", "config and tensors are what was saved"
    )  # fmt: skip
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["others"] == {}
    changed = changes(Path("adapter"))
    assert {site["name"] for site in found["sites"]} == {name for name, delta in changed.items() if delta.any()}
    for site in found["sites"]:
        values = torch.linalg.svdvals(changed[site["name"]])
        shares = values[:2] / values[:2].sum()
        assert site["norm"] == pytest.approx(float(torch.linalg.matrix_norm(changed[site["name"]])), rel=1e-5)
        assert site["effective_rank"] == pytest.approx(float((shares**-shares).prod()), rel=1e-5)
        assert (site["op"], site["columns"]) == ("linear", {"r": 2, "alpha": 8})
        assert site["tensors"]["lora_A.weight"] == [2, 32]


def test_the_table_has_a_row_for_each_site() -> None:
    lines = peftc("inspect", "adapter").out.splitlines()
    assert lines[0].startswith("adapter: LORA, ")
    assert lines[3].split() == ["site", "r", "alpha", "parameters", "norm", "effective", "rank"]
    assert [line.split()[:3] for line in lines[4:6]] == [
        ["model.layers.0.self_attn.q_proj", "2", "8"],
        ["model.layers.0.self_attn.v_proj", "2", "8"],
    ]
    assert len(lines) == 10


def test_layers_are_in_the_order_of_their_numbers() -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    first = {key: value for key, value in tensors.items() if ".layers.0." in key}
    layers = range(12)
    save_file(
        {key.replace(".0.", f".{layer}."): value.clone() for layer in layers for key, value in first.items()}
        | {f"base_model.model.beside.{layer}": torch.ones(1) for layer in layers},
        "adapter/adapter_model.safetensors",
    )
    printed = peftc("inspect", "adapter", "--html", "adapter.html").out.splitlines()
    sites = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in layers for name in "qv"]
    beside = [f"base_model.model.beside.{layer}" for layer in layers]
    assert [line.split()[0] for line in printed[4 : 4 + len(sites)]] == sites
    assert [line.split()[1] for line in printed[4 + len(sites) :]] == beside
    page = Path("adapter.html").read_text(encoding="utf-8")
    assert re.findall(r"beside\.\d+", page) == [name.removeprefix("base_model.model.") for name in beside]


def test_a_page_has_the_norm_of_every_change_and_its_spectrum() -> None:
    printed = peftc("inspect", "adapter").out
    ran = peftc("inspect", "adapter", "--html", "adapter.html")
    assert (ran.out, ran.err) == (printed, "written to adapter.html\n")
    page = parsed(Path("adapter.html").read_text(encoding="utf-8"))
    (data,) = (json.loads(script.text or "") for script in page.iter("script") if script.get("type"))
    changed = {name: delta for name, delta in changes(Path("adapter")).items() if delta.any()}
    assert {name for name, *_ in data} == set(changed)
    for name, norm, _, spectrum in data:
        assert norm == pytest.approx(float(torch.linalg.matrix_norm(changed[name])), rel=1e-3)
        assert spectrum == pytest.approx(torch.linalg.svdvals(changed[name])[:2].tolist(), rel=1e-3)
    shown = {text_of(button) for button in page.iter("button")}
    assert shown == {f"{norm:.3g}" for _, norm, *_ in data}


def save(spec: Any) -> str:
    perturb(library.compile(llama(), spec)).save_pretrained("another")
    return "another"


@pytest.mark.parametrize(
    ("spec", "base"),
    [
        (
            library.LoraConfig(target_modules=["embed_tokens", "q_proj"], rank_pattern={"q_proj": 3}, use_rslora=True),
            False,
        ),
        (library.LoraConfig(target_modules=["v_proj"], init_lora_weights="pissa"), False),
        (library.DeloraConfig(target_modules=["k_proj"], r=4), False),
        (library.MissConfig(target_modules=["v_proj"], r=4), True),
    ],
)
def test_methods_whose_change_is_a_product(spec: Any, base: bool) -> None:
    folder = save(spec)
    changed = changes(Path(folder))
    for site in peftc("inspect", folder, *(("--base", "model") if base else ()), "--json").json["sites"]:
        expected = float(torch.linalg.matrix_norm(changed[site["name"]]))
        assert site["norm"] == pytest.approx(expected, rel=1e-4), site["name"]


@pytest.mark.parametrize(
    "spec",
    [
        library.MissConfig(target_modules=["v_proj"], r=4),  # How many inputs it has, its file does not say.
        library.MissConfig(target_modules=["v_proj"], r=16),  # Nor if its one tensor is square.
        library.LoraConfig(target_modules=["v_proj"], use_dora=True),
        library.IA3Config(),
        library.FourierFTConfig(target_modules=["v_proj"], n_frequency=10),
    ],
)
def test_a_change_that_is_none_or_not_told(spec: Any) -> None:
    sites = peftc("inspect", save(spec), "--json").json["sites"]
    assert sites
    assert {(site["norm"], site["effective_rank"]) for site in sites} == {(None, None)}


def tensors_at(folder: Any, fqn: str) -> dict[str, torch.Tensor]:
    """What the file in `folder` has at a site."""
    found, prefix = load_file(Path(folder) / "adapter_model.safetensors"), f"base_model.model.{fqn}."
    return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    "name", [name for name, cls in registry.spec_classes().items() if not issubclass(cls, PromptSpec)]
)
def test_files_of_every_method_are_read(name: str) -> None:
    spec = registry.spec_classes()[name](**{"target_modules": ["q_proj", "v_proj"], **EVERY_METHOD[name]})
    plan = library.plan(llama(), spec)
    folder = save(spec)
    for base in ((), ("--base", "model")):
        found = peftc("inspect", folder, *base, "--json").json
        sites = {site["name"]: site for site in found["sites"]}
        own = [edit for edit in plan.edits if any(param.saved and not param.shared for param in edit.params)]
        assert sites.keys() == {edit.site for edit in own}
        for edit in own:
            shapes = {param.key: list(param.shape) for param in edit.params if param.saved and not param.shared}
            if name == "ADAMSS":  # Its files have the factors of each subspace by themselves.
                shapes = {key: list(t.shape) for key, t in tensors_at(folder, edit.site).items()}
                assert {"adamss_A.0", "adamss_B.4", "adamss_newB", "adamss_rows"} <= shapes.keys()
            assert sites[edit.site]["tensors"] == shapes
            assert sites[edit.site]["op"] in (plan.sites[edit.site].op, None)
            for column, value in sites[edit.site]["columns"].items():
                assert value == edit.constants[edit.rule.columns[column]]
        assert found["damage"] is None


def test_what_lies_beside_the_sites() -> None:
    found = peftc("inspect", save(library.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])), "--json")
    assert found.json["others"] == {"base_model.model.lm_head.weight": [64, 32]}
    prompt = library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert peftc("inspect", save(prompt)).out.endswith("beside     prompt_embeddings 4×32\n")


def test_damage_is_told_and_1() -> None:
    file = Path("adapter/adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ran = peftc("inspect", "adapter", "--json", code=1)
    assert "1 of 12 tensors are not what was saved" in ran.json["damage"]
    assert len(ran.json["sites"]) == 6
    assert "1 of 12 tensors" in peftc("inspect", "adapter", code=1).out


def test_files_without_a_manifest_are_not_known_to_be_whole() -> None:
    save_file(load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.safetensors", {"format": "pt"})
    found = peftc("inspect", "adapter", "--json").json
    assert found["integrity"].startswith("not known")
    assert found["damage"] is None


def test_whether_the_base_is_the_one_it_was_saved_with() -> None:
    said = "the weights it was saved with, as far as they were sampled"
    assert peftc("inspect", "adapter", "--json").json["fit"] is None
    assert peftc("inspect", "adapter", "--base", "model", "--json").json["fit"] == said
    assert f"weights    {said}\n" in peftc("inspect", "adapter", "--base", "model").out
    assert peftc("inspect", "adapter", "--base", "model/config.json", "--json").json["fit"] is None
    tensors = load_file("model/model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, "model/model.safetensors", {"format": "pt"})
    ran = peftc("inspect", "adapter", "--base", "model", "--json", "--html", "adapter.html", code=3)
    assert (ran.json["fit"], ran.json["damage"]) == ("another model", None)
    assert "sampled weights of the base model are not those" in ran.json["misfit"]
    page = text_of(parsed(Path("adapter.html").read_text(encoding="utf-8")))
    assert "another base" in page
    assert "sampled weights of the base model are not those" in page
    save_file(load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.safetensors", {"format": "pt"})
    assert peftc("inspect", "adapter", "--base", "model", "--json").json["fit"].startswith("not known")


def test_an_adapter_that_can_be_on_no_such_model_is_3() -> None:
    model_of("gpt2").save_pretrained("gpt2")
    assert "matches none of" in peftc("inspect", "adapter", "--base", "gpt2", "--json", code=3).json["misfit"]


def test_files_are_checked_against_their_manifest() -> None:
    assert peftc("verify", "adapter").out == "adapter: config and tensors are what was saved\n"
    assert peftc("verify", "adapter", "--json").json["adapter"] == "adapter"
    config = Path("adapter/adapter_config.json")
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "lora_alpha": 16}))
    assert "lora_alpha is 16, was 8" in peftc("verify", "adapter", code=1).err
    config.write_text(json.dumps(fields))
    save_file(load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.safetensors", {"format": "pt"})
    told = peftc("verify", "adapter", code=1).err
    (way,) = re.findall(r"peftc (convert .*?) writes the same with one", told)
    peftc(*way.replace("NEW", "new").replace("MODEL", "model").split())
    peftc("verify", "new")


def test_which_runtimes_take_it() -> None:
    found = peftc("preflight", "adapter", "--json").json
    assert {verdict["runtime"]: verdict["takes"] for verdict in found} == {
        "vllm": True, "sglang": True, "tensorrt-llm": True, "llama.cpp": False, "mlx": False, "onnxruntime": False
    }  # fmt: skip
    assert peftc("preflight", "adapter").out == "".join(f"{verdict}\n" for verdict in library.preflight("adapter"))
    assert "GGUF" in peftc("preflight", "adapter", "--runtime", "llama.cpp", code=3).out


def test_another_form_with_equal_outputs() -> None:
    folder = save(library.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"q_proj": 2}))
    peftc("preflight", folder, "--runtime", "sglang", code=3)
    peftc("convert", folder, "served", "--base", "model")
    peftc("preflight", "served", "--runtime", "sglang")
    assert json.loads(Path("served/adapter_config.json").read_text())["rank_pattern"] == {}
    ids = token_ids(2, 7, 64)
    with torch.no_grad():
        one, other = (library.load(llama(), name)(ids).logits for name in (folder, "served"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_another_dtype() -> None:
    before = load_file("adapter/adapter_model.safetensors")
    for dtype in ("bfloat16", "float16"):
        peftc("convert", "adapter", dtype, "--base", "model", "--form", "peft", "--dtype", dtype)
        found = load_file(f"{dtype}/adapter_model.safetensors")
        assert found.keys() == before.keys()
        assert all(torch.equal(tensor, before[key].to(getattr(torch, dtype))) for key, tensor in found.items())
        peftc("verify", dtype)
    model = library.load(llama(), "adapter", verify="files")
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).fill_(1e6)
    with pytest.raises(library.CheckpointError, match=r"numbers that torch\.float16 can't hold; take torch.bfloat16"):
        model.save_pretrained("large", dtype=torch.float16)
    model.save_pretrained("large", dtype=torch.bfloat16)


def test_a_pickle_becomes_safetensors() -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    Path("adapter/adapter_model.safetensors").unlink()
    assert peftc("merge", "model", "adapter", "out", code=1).err.endswith(
        "adapter: holds no adapter_model.safetensors\n"
    )
    torch.save(tensors, "adapter/adapter_model.bin")
    assert "(allow_pickle=True)" in peftc("merge", "model", "adapter", "out", code=1).err
    assert "allow_pickle=True" in peftc("convert", "adapter", "new", "--base", "model", "--form", "peft", code=1).err
    peftc("convert", "adapter", "new", "--base", "model", "--form", "peft", "--allow-pickle")
    found = load_file("new/adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    Path("new/adapter_model.safetensors").rename("moved")
    Path("new/adapter_model.safetensors").symlink_to("gone")
    assert "a link to gone, which is not there" in peftc("merge", "model", "new", "out", code=1).err


def test_a_sum_of_adapters_is_an_adapter() -> None:
    said = peftc("combine", "adapter", "other", "mix", "--base", "model", "--weights", "-0.7,0.3", "--type", "cat").out
    assert said == "written to mix\n"
    found, one, other = (changes(Path(folder)) for folder in ("mix", "adapter", "other"))
    for name, delta in found.items():
        torch.testing.assert_close(delta, -0.7 * one[name] + 0.3 * other[name], rtol=1e-5, atol=1e-5)
    assert sum(bool(delta.any()) for delta in found.values()) == 6


def test_every_option_of_a_sum_reaches_it() -> None:
    how = {"--type": "ties_svd", "--rank": 3, "--density": 0.6, "--majority": "frequency"}
    options = [part for option in how.items() for part in option]
    peftc("combine", "adapter", "other", "mix", "--base", "model", "--weights", "1,2", *options)
    compiled = library.load(llama(), "adapter", "a", verify="files")
    compiled.load_adapter("other", "b", verify="files")
    compiled.add_weighted_adapter(
        ["a", "b"], [1, 2], "mix", "ties_svd", svd_rank=3, density=0.6, majority_sign_method="frequency"
    )
    found, expected = load_file("mix/adapter_model.safetensors"), compiled.adapter_state_dict("mix")
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


def test_the_methods_that_are_installed() -> None:
    found = {method["method"]: method for method in peftc("rules", "--json").json}
    assert set(found) == set(registry.spec_classes())
    assert [rule["class"] for method in found.values() for rule in method["rules"]] == [
        type(rule).__name__ for name in found for rule in registry.rules() if rule.spec is registry.spec_classes()[name]
    ]
    assert all(Path(rule["file"]).is_file() for method in found.values() for rule in method["rules"])
    assert found["LORA"]["config"] == "LoraConfig"
    assert found["LORA"]["offers"] == ["same start", "merge", "in pieces", "factors", "sums", "scale"]
    assert found["C3A"]["offers"] == ["merge"]
    assert found["PROMPT_TUNING"]["offers"] == []
    lines = peftc("rules").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(found)


def test_what_a_model_offers() -> None:
    found = peftc("rules", "model/config.json", "--json").json
    model = llama()
    assert (found["model"], found["model_type"]) == ("LlamaForCausalLM", "llama")
    plan = library.plan(model, library.LoraConfig(target_modules=r".*(proj|lm_head|embed_tokens)"))
    sites = {site["name"]: site for site in found["sites"]}
    assert plan.sites.keys() <= sites.keys()
    for name, site in plan.sites.items():
        assert isinstance(site, WeightSite)
        own = sites[name]
        assert (own["op"], own["in_features"], own["out_features"], own["role"]) == (
            site.op, site.in_features, site.out_features, site.role
        )  # fmt: skip
    assert sites["model.layers.2.self_attn.q_proj"]["role"] == "attention.query"
    for method, fields in found["defaults"].items():  # They are what a plan without targets adapts.
        spec = registry.spec_classes()[method](**EVERY_METHOD.get(method, {}))
        asked = spec.model_copy(update=dict.fromkeys(fields))
        resolved = library.plan(model, asked).adapters["default"]
        assert {field: plain(getattr(resolved, field)) for field in fields} == fields, method
    assert {"LORA", "IA3", "VERA", "TRAINABLE_TOKENS"} <= found["defaults"].keys()


def test_what_a_model_offers_is_a_table() -> None:
    lines = peftc("rules", "model").out.splitlines()
    assert lines[0] == "LlamaForCausalLM (llama): 30 sites"
    assert lines[1].split() == ["site", "×", "kind", "in", "→", "out", "role"]
    rows = [line.split() for line in lines]
    assert ["model.layers.{0–2}.self_attn.q_proj", "3", "linear", "32", "→", "32", "attention.query"] in rows
    assert ["LORA", "q_proj,", "v_proj"] in rows
    assert any(line.startswith("IA3 ") and line.endswith("; feedforward_modules: down_proj") for line in lines)
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(
        json.dumps({**config, "model_type": "olmo", "architectures": ["OlmoForCausalLM"]})
    )
    assert "IA3 " not in peftc("rules", "model").out
    assert lines[-1].startswith("For the other methods, name the modules")
