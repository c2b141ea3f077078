"""Exports against the live model: what they compute, that nothing else changes, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
KINDS: dict[str, tuple[str, list[str]]] = {
    "llama": ("LlamaForCausalLM", ["q_proj", "down_proj"]),
    "qwen2": ("Qwen2ForCausalLM", ["q_proj", "down_proj"]),
    "gpt2": ("GPT2LMHeadModel", ["c_attn", "c_proj"]),
    "opt": ("OPTForCausalLM", ["q_proj", "fc1"]),
    "bert": ("BertForSequenceClassification", ["query", "value"]),
    "t5": ("T5ForConditionalGeneration", ["q", "wo"]),
    "vit": ("ViTForImageClassification", ["q_proj", "v_proj"]),
    "mixtral": ("MixtralForCausalLM", ["q_proj", "v_proj"]),
}


def compiled_of(kind: str) -> Any:
    cls, targets = KINDS[kind]
    torch.manual_seed(0)
    more = {"layer_types": ["full_attention"]} if kind == "qwen2" else {}
    model = small_model(kind, cls, **more)
    assert model is not None
    return perturb(peftc.compile(model, peftc.LoraConfig(r=4, target_modules=targets)))


def inputs_for(model: Any, kind: str) -> dict[str, Tensor] | None:
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, model.config.image_size, model.config.image_size)}
    return None


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "pt2", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_live_one_does(kind: str, to: Any, tmp_path: Path) -> None:
    model = compiled_of(kind)
    before, training = bits(model), [module.training for module in model.modules()]
    made = model.export(tmp_path, to, inputs=inputs_for(model, kind))
    assert made.difference <= 1e-5 * max(made.scale, 1)
    assert made.tokens_equal == made.tokens
    assert same_bits(model, before)
    assert [module.training for module in model.modules()] == training
    assert not model.merged_adapters
    again = peftc.verify(tmp_path)
    assert again.difference <= 1e-5 * max(made.scale, 1)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_adapters_inside_and_other_lengths(to: Any, tmp_path: Path) -> None:
    from transformers.exporters.base import ExportedModel

    model = compiled_of("llama")
    model.export(tmp_path, to, adapters="inside")
    run: Any = ExportedModel.from_pretrained(str(tmp_path))
    ids = torch.randint(3, 60, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(
            run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
            model.eval()(ids).logits,
            rtol=1e-4,
            atol=1e-5,
        )


def test_node_counts_are_those_of_the_bare_model_and_of_the_plan(tmp_path: Path) -> None:
    def products(folder: Path) -> int:
        graph = torch.export.load(folder / "model.pt2").graph
        return sum(node.op == "call_function" and "linear" in str(node.target) for node in graph.nodes)

    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    given = {"input": torch.randn(3, 8)}
    torch.export.save(torch.export.export(bare, (given["input"],)), tmp_path / "model.pt2")
    model = perturb(peftc.compile(bare, peftc.LoraConfig(target_modules=["0", "2"])))
    model.export(tmp_path / "merged", "pt2", inputs=given)
    model.export(tmp_path / "inside", "pt2", adapters="inside", inputs=given)
    assert products(tmp_path) == products(tmp_path / "merged") == 2
    assert products(tmp_path / "inside") == 2 + 2 * len(model.plan.edits)


@pytest.mark.slow
def test_a_program_runs_where_there_is_no_peftc(tmp_path: Path) -> None:
    model = compiled_of("llama")
    model.export(tmp_path, "pt2", adapters="inside")
    code = """
import sys
sys.modules["peftc"] = None
import torch
from transformers.exporters.base import ExportedModel
from safetensors.torch import load_file
folder = sys.argv[1]
tensors = load_file(folder + "/certificate.safetensors")
made = ExportedModel.from_pretrained(folder)(
    **{name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
)
print(float((made.logits - tensors["output.logits"]).abs().max()) < 1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "True"


def test_what_is_trained_whole_goes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = small_model("llama", "LlamaForSequenceClassification", pad_token_id=0)
    assert base is not None
    model = perturb(peftc.compile(base, peftc.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])))
    model.export(tmp_path)
    plain = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not [name for name in plain.state_dict() if "lora" in name or "modules_to_save" in name]
    assert {"certificate.json", "model.safetensors", "config.json"} <= {file.name for file in tmp_path.iterdir()}


def test_virtual_tokens_go_inside_only(tmp_path: Path) -> None:
    base = small_model("llama", "LlamaForCausalLM")
    assert base is not None
    model = perturb(peftc.compile(base, peftc.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    with pytest.raises(peftc.ExportError, match=r"can't be merged.*adapters='inside' exports the model"):
        model.export(tmp_path / "a", "pt2")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())
    made = model.export(tmp_path / "b", "pt2", adapters="inside")
    assert made.difference <= 1e-5


class Branching(nn.Module):
    """No program can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another runtime": ({"to": "tflite"}, "valid are hf, pt2, onnx"),
    "a checkpoint with adapters": ({"to": "hf", "adapters": "inside"}, "save_pretrained writes them beside it"),
    "no tensors": ({"to": "pt2", "inputs": {"input_ids": [1, 2]}}, "expected tensors by name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_done(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(peftc.ExportError, match=message):
        compiled_of("llama").export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_module_of_ones_own_is_asked_for_inputs_and_may_not_be_exportable(tmp_path: Path) -> None:
    model = perturb(peftc.compile(Branching(), peftc.LoraConfig(target_modules=["linear"])))
    with pytest.raises(peftc.ExportError, match="Branching takes x"):
        model.export(tmp_path / "out", "pt2")
    with pytest.raises(peftc.ExportError, match="is no model of transformers; merge_and_unload"):
        model.export(tmp_path / "out", "hf", inputs={"x": torch.ones(2, 4)})


def test_a_failed_export_leaves_the_old_files_and_the_model(tmp_path: Path) -> None:
    model = perturb(peftc.compile(Branching(), peftc.LoraConfig(target_modules=["linear"])))
    (tmp_path / "model.pt2").write_text("old")
    before = bits(model)
    with pytest.raises(peftc.ExportError, match="Branching can't be exported"):
        model.export(tmp_path, "pt2", inputs={"x": torch.ones(2, 4)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "old"
    assert same_bits(model, before)


def test_verifying_finds_files_and_outputs_that_are_others(tmp_path: Path) -> None:
    model = perturb(peftc.compile(nn.Sequential(nn.Linear(4, 4)), peftc.LoraConfig(target_modules=["0"])))
    model.export(tmp_path, "pt2", inputs={"input": torch.ones(2, 4)})
    peftc.verify(tmp_path)
    other = nn.Sequential(nn.Linear(4, 4))
    torch.export.save(torch.export.export(other, (), {"input": torch.ones(2, 4)}), tmp_path / "model.pt2")
    with pytest.raises(peftc.ExportError, match=r"model.pt2 is not what was exported"):
        peftc.verify(tmp_path)
    from peftc.export.certificate import hashes

    data = json.loads((tmp_path / "certificate.json").read_text())
    (tmp_path / "certificate.json").write_text(json.dumps({**data, "files": hashes(tmp_path)}))
    with pytest.raises(peftc.ExportError, match="outputs differ by"):
        peftc.verify(tmp_path)
    with pytest.raises(peftc.ExportError, match="holds no certificate"):
        peftc.verify(tmp_path / "nowhere")


def test_a_checkpoint_that_others_merged_is_checked(tmp_path: Path) -> None:
    import peft

    base = small_model("llama", "LlamaForCausalLM")
    assert base is not None
    base.save_pretrained(tmp_path / "base")
    given = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs: Any = peft.get_peft_model(given, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = peftc.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.difference < 1e-6
    with pytest.raises(peftc.ExportError, match=r"q_proj.weight differs by"):
        peftc.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "base")


def test_the_certificate_says_what_it_was_made_from(tmp_path: Path) -> None:
    made: list[Any] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = perturb(
            peftc.compile(small_model("llama", "LlamaForCausalLM"), peftc.LoraConfig(target_modules=["q_proj"]))
        )
        made.append(model.export(tmp_path / str(seed)))
        with model.merged():  # Of a merged model the same.
            assert model.export(tmp_path / "merged").sources == made[-1].sources
    assert set(made[0].sources) == {"base", "default"}
    assert made[0].sources["base"] == made[1].sources["base"]
    assert made[0].sources["default"] != made[1].sources["default"]
    assert json.loads((tmp_path / "0" / "certificate.json").read_text())["sources"] == made[0].sources


def held_by(path: Path) -> set[str]:
    """The adapters of which a program holds tensors."""
    program = torch.export.load(path)
    return {name.split(".")[-2] for name in [*program.state_dict, *program.constants] if "lora" in name}


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.parametrize("kind", ["llama", "own"])
def test_a_program_holds_no_tensors_of_adapters_that_do_nothing(kind: str, capture: Any, tmp_path: Path) -> None:
    base: Any = small_model("llama", "LlamaForCausalLM") if kind == "llama" else nn.Sequential(nn.Linear(4, 4))
    inputs = (
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)} if kind == "llama" else {"input": torch.ones(2, 4)}
    )
    spec = peftc.LoraConfig(r=2, target_modules=["q_proj"] if kind == "llama" else ["0"])
    given = inputs if capture == "export" else None
    model = perturb(peftc.compile(base, dict.fromkeys(("one", "two"), spec), capture=capture, inputs=given))
    for adapters, expected in (("inside", {"one"}), ("merged", set()), ("inputs", set())):
        model.export(tmp_path / adapters, "pt2", adapters=adapters, inputs=inputs)
        assert held_by(tmp_path / adapters / "model.pt2") == expected
        assert peftc.verify(tmp_path / adapters).difference < 1e-5
