"""`plan`, `diff`, `explain`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import peftc as library
from tests.support.command import peftc
from tests.support.hub_server import TOKEN, connected
from tests.support.models import inputs_for, model_of
from tests.support.pages import parsed, text_of

pytestmark = pytest.mark.usefixtures("here")


def config(**changes: Any) -> Path:
    """A folder with a config and no weights."""
    folder = Path("bare")
    folder.mkdir(exist_ok=True)
    fields = json.loads(Path("model/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return folder


def test_a_plan_of_a_config_is_that_of_the_model() -> None:
    spec = library.LoraConfig(r=8, target_modules=["q_proj", "down_proj"])
    model: Any = AutoModelForCausalLM.from_pretrained("model")
    expected = library.plan(model, spec)
    arguments = (config() / "config.json", "--targets", "q_proj,down_proj")
    assert peftc("plan", *arguments).out == f"{expected}\n"
    ran = peftc("plan", *arguments, "--json")
    told = ran.json
    for site in told["sites"].values():
        assert site.pop("device") == "meta"
        site["device"] = "cpu"
    assert told == json.loads(expected.to_json())
    # What it prints can be applied to the model with its weights.
    compiled = library.compile(model, library.Plan.from_json(ran.out))
    assert compiled.get_nb_trainable_parameters()[0] == expected.costs.trainable
    compiled(**inputs_for("llama"), labels=inputs_for("llama")["input_ids"]).loss.backward()
    assert {parameter.device.type for parameter in compiled.parameters()} == {"cpu"}


def test_options_take_the_place_of_fields() -> None:
    ran = peftc(
        "plan", "model", "adapter", "--r", 3, "--field", "lora_alpha=5", "--field", "rank_pattern={v_proj: 1}", "--json"
    )
    (spec,) = ran.json["adapters"].values()
    assert (spec["r"], spec["lora_alpha"], spec["rank_pattern"]) == (3, 5, {"v_proj": 1})
    assert spec["target_modules"] == ["q_proj", "v_proj"]


def test_any_method_by_its_name() -> None:
    ran = peftc("plan", "model", "--method", "ia3", "--json")
    assert {edit["rule"]["name"] for edit in ran.json["edits"]} == {"ia3"}
    everything = peftc("plan", "model", "--method", "loha", "--targets", "all-linear", "--json")
    assert len(everything.json["sites"]) == 21


def test_blanks_between_targets_are_no_part_of_them() -> None:
    plans = [
        peftc("plan", "model", "--targets", text, "--json").json for text in ("q_proj,v_proj", " q_proj , v_proj,")
    ]
    assert plans[0] == plans[1]
    assert len(peftc("plan", "model", "--targets", " all-linear ", "--json").json["sites"]) == 21


def test_what_is_missed_is_3() -> None:
    ran = peftc("plan", "model", "--targets", "q_proj,q_prj", code=3)
    assert "✗ missed" in ran.out
    assert "Nearest: 'q_proj'" in ran.out
    told = peftc("plan", "model", "--targets", "q_proj,q_prj", "--json", code=3)
    assert [miss["value"] for miss in told.json["misses"]] == ["q_prj"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "lorra"), "'LORRA' is not known"),
        (("--field", "lora_alhpa=1"), "LoraConfig.lora_alhpa: no such field. Nearest: 'lora_alpha'"),
        (("--field", "lora_alpha"), "give it as name=value"),
        (("--field", "lora_alpha=many"), "lora_alpha: got 'many'"),
        (("--method", "ia3", "--r", 4), "IA3Config.r: no such field"),
        (("adapter", "--method", "ia3"), "give one of the two"),
    ],
)
def test_specs_that_make_no_sense(options: tuple[Any, ...], told: str) -> None:
    assert told in peftc("plan", "model", *options, code=1).err


def test_the_dtype_is_that_of_the_config() -> None:
    costs = {
        dtype: peftc("plan", config(dtype=dtype), "--targets", "q_proj", "--json").json["costs"]
        for dtype in ("float32", "bfloat16")
    }
    base = {dtype: cost["weight_bytes"] - cost["gradient_bytes"] for dtype, cost in costs.items()}
    parameters = sum(parameter.numel() for parameter in model_of("llama").parameters())
    assert base == {"float32": 4 * parameters, "bfloat16": 2 * parameters}


def test_a_config_that_names_no_class() -> None:
    folder = config(architectures=None)
    assert "Name one with --class" in peftc("plan", folder, "--targets", "q_proj", code=1).err
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM"):
        ran = peftc("plan", folder, "--targets", "q_proj", "--class", name, "--json")
        assert ran.json["model"] == "LlamaForCausalLM"
    for name in ("LlamaForCausalLN", "LlamaConfig", "AutoModelForImageClassification"):
        assert "names no class" in peftc("plan", folder, "--class", name, code=1).err


def test_a_config_that_makes_no_model() -> None:
    assert "is no config of a model" in peftc("plan", config(model_type="llamma"), code=1).err
    (Path("bare") / "config.json").write_text("{")
    assert "is no config of a model" in peftc("plan", "bare", code=1).err


def test_differences_of_plans() -> None:
    plans = {name: peftc("plan", "model", "--targets", targets, "--json").out for name, targets in
             {"a.json": "q_proj", "b.json": "q_proj,v_proj"}.items()}  # fmt: skip
    for name, text in plans.items():
        Path(name).write_text(text)
    expected = library.Plan.from_json(plans["a.json"]).diff(library.Plan.from_json(plans["b.json"]))
    assert "+ site model.layers.{0–2}.self_attn.v_proj" in expected
    assert peftc("diff", "a.json", "b.json").out == f"{expected}\n"
    assert peftc("diff", "a.json", "b.json", "--json").json == {"equal": False, "differences": expected.splitlines()}
    assert peftc("diff", "a.json", "a.json").out == "equal\n"
    assert "one is a plan" in peftc("diff", "a.json", "adapter", code=1).err


def test_differences_of_adapters() -> None:
    fields = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("other.json").write_text(json.dumps({**fields, "r": 16}))
    assert peftc("diff", "adapter", "other.json").out == "~ r: 2 → 16\n"
    assert peftc("diff", "adapter", "other.json", "--json").json == {"equal": False, "differences": ["~ r: 2 → 16"]}
    assert peftc("diff", "adapter", "adapter", "--json").json == {"equal": True, "differences": []}
    Path("method.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["k_proj"]}))
    lines = peftc("diff", "adapter", "method.json").out.splitlines()
    assert {"- r: 2", "+ init_ia3_weights: True", "~ peft_type: 'LORA' → 'IA3'"} <= set(lines)


def test_why_a_module_is_adapted_or_not() -> None:
    with torch.device("meta"):
        model = model_of("llama")
    compiled = library.compile(model, library.load_spec("adapter"))
    for fqn in ("model.layers.0.self_attn.q_proj", "lm_head"):
        assert peftc("explain", "model/config.json", "adapter", fqn).out == f"{compiled.explain(fqn)}\n"
    ran = peftc("explain", "model", "adapter", "model.layers.0.self_attn.q_proj", "--json")
    assert ran.json["fqn"] == "model.layers.0.self_attn.q_proj"
    assert "lora @output adds lora_A 2×32, lora_B 32×2" in ran.json["lines"][1]


def test_a_page_beside_what_is_printed() -> None:
    told = peftc("plan", "model", "--targets", "q_proj")
    ran = peftc("plan", "model", "--targets", "q_proj", "--html", "plan.html")
    assert (ran.out, ran.err) == (told.out, "written to plan.html\n")
    page = parsed(Path("plan.html").read_text(encoding="utf-8"))
    places = {place.get("data-p") for place in page.iter("li")}
    assert {"model.layers.{0–2}.self_attn.q_proj", "model.layers.{0–2}.self_attn.k_proj", "lm_head"} <= places
    told = peftc("plan", "model", "--targets", "q_prj,q_proj", "--json", "--html", "missed.html", code=3)
    assert told.json["misses"]
    assert "'q_prj' matches none" in text_of(parsed(Path("missed.html").read_text(encoding="utf-8")))
    missing = peftc("plan", "model", "--targets", "q_proj", "--html", "nowhere/plan.html", code=1)
    assert missing.err == (
        "PeftcError: nowhere/plan.html: can't be written: No such file or directory. Give --html a file in a folder that is"
        " there\n"
    )


def test_a_page_of_two_plans() -> None:
    for name, targets in {"a.json": "q_proj", "b.json": "q_proj,v_proj"}.items():
        Path(name).write_text(peftc("plan", "model", "--targets", targets, "--json").out)
    printed = peftc("diff", "a.json", "b.json").out
    ran = peftc("diff", "a.json", "b.json", "--html", "both.html")
    assert (ran.out, ran.err) == (printed, "written to both.html\n")
    text = text_of(parsed(Path("both.html").read_text(encoding="utf-8")))
    assert "3 alike, 3 in B only" in text
    refused = peftc("diff", "adapter", "adapter", "--html", "no.html", code=1)
    assert "peftc plan MODEL adapter --json makes one" in refused.err
    assert not Path("no.html").exists()
    # What it says is what helps.
    Path("c.json").write_text(peftc("plan", "model", "adapter", "--json").out)
    peftc("diff", "c.json", "a.json", "--html", "no.html")
    assert Path("no.html").exists()


def test_a_model_on_the_hub_is_planned_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = peftc("plan", "model", "--targets", "q_proj").out
    with connected(monkeypatch, tmp_path) as server:
        api = HfApi(token=TOKEN)
        api.create_repo("user/model")
        api.upload_folder(repo_id="user/model", folder_path="model")
        server.requests.clear()
        assert peftc("plan", "user/model", "--targets", "q_proj").out == expected
        assert peftc("rules", "user/model", "--json").json["model"] == "LlamaForCausalLM"
        assert not [asked for asked in server.requests if ".safetensors" in asked], "weights are not fetched"
        assert "neither a folder here" in peftc("plan", "user/modell", "--targets", "q_proj", code=1).err
        api.create_repo("user/empty")
        assert "user/empty: has no config.json" in peftc("plan", "user/empty", code=1).err
