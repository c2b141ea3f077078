"""One program and any number of adapters beside it: what each computes, and that the live model stays as it was."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from tests.support.adapters import perturb
from tests.support.programs import program_inputs, program_model

TARGETS: dict[str, list[list[str]]] = {
    "llama": [["q_proj", "down_proj"], ["embed_tokens", "q_proj"]],
    "t5": [["q", "wo"], ["k"]],
    "bert": [["query", "dense"], ["value"]],
    "gpt2": [["c_attn"], ["c_proj", "wte"]],
}


def two_adapters(kind: str) -> tuple[Any, Any]:
    """The model, and that with adapters of other ranks, scalings and sites."""
    model, (first, second) = program_model(kind), TARGETS[kind]
    torch.manual_seed(0)
    compiled = peftc.compile(model, peftc.LoraConfig(r=3, target_modules=first, use_rslora=True), "a")
    compiled.add_adapter("b", peftc.LoraConfig(r=1, lora_alpha=2, target_modules=second))
    return model, perturb(compiled)


def run_onnx(folder: Path, adapter: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As a user of onnxruntime does, without peftc."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    run = onnxruntime.RunOptions()
    if adapter is not None:
        own = onnxruntime.LoraAdapter()
        own.Load(str(folder / "adapters" / f"{adapter}.onnx_adapter"))
        run.add_active_adapter(own)
    return torch.from_numpy(session.run(["logits"], {k: v.numpy() for k, v in inputs.items()}, run)[0])


def run_pt2(folder: Path, adapter: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As a user of torch alone does: the factors by name, of any rank; zeros for those that an adapter has not."""
    program = torch.export.load(folder / "model.pt2")
    own = load_file(folder / "adapters" / f"{adapter}.safetensors") if adapter is not None else {}
    given: dict[str, torch.Tensor] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.graph_signature.user_inputs and node.name not in inputs:
            sizes = [int(str(size)) if str(size).isdigit() else 5 for size in node.meta["val"].shape]
            given[node.name] = own.get(node.name, torch.zeros(sizes))
    return program.module()(**inputs, **given)["logits"]


def run_aoti(folder: Path, adapter: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """As a user of torch alone does: the factors of none, and in their place those of an adapter."""
    own = load_file(folder / "adapters" / f"{adapter}.safetensors") if adapter is not None else {}
    program = torch._inductor.aoti_load_package(str(folder / "compiled.pt2"))
    return program(**{**inputs, **load_file(folder / "no_adapter.safetensors"), **own})["logits"]


RUNS = {"pt2": run_pt2, "onnx": run_onnx, "aoti": run_aoti}


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNS)
@pytest.mark.parametrize("kind", TARGETS)
def test_every_adapter_and_none(kind: str, to: Any, tmp_path: Path) -> None:
    model, compiled = two_adapters(kind)
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    training, plan = [module.training for module in compiled.modules()], compiled.plan
    sample = {
        k: v for k, v in program_inputs(kind, model, labels=False).items() if kind != "t5" or k != "attention_mask"
    }
    certificate = compiled.export(tmp_path / "out", to=to, adapters="inputs", inputs=sample)
    assert certificate.names == ("a", "b")
    assert certificate.difference <= 1e-5 * max(1, certificate.scale)
    now = compiled.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert [module.training for module in compiled.modules()] == training
    assert (compiled.plan, compiled.active_adapters) == (plan, ["a"])
    run = RUNS[to]
    rows, length = 3, 6
    inputs = {k: v for k, v in program_inputs(kind, model, rows, length, labels=False).items() if k in sample}
    for adapter in (None, "a", "b"):
        with torch.no_grad():
            if adapter is not None:
                compiled.set_adapter(adapter)
            live = (model if adapter is None else compiled.eval())(**inputs).logits
            torch.testing.assert_close(run(tmp_path / "out", adapter, inputs), live, rtol=1e-4, atol=1e-5)
    assert peftc.verify(tmp_path / "out").difference <= 1e-5 * max(1, certificate.scale)


def test_what_has_no_factors_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = {"input": torch.randn(2, 4)}
    ia3 = peftc.compile(net, peftc.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(peftc.ExportError, match=r"is IA3; servers take LoRA.*adapters='merged' takes anything"):
        ia3.export(tmp_path / "out", to="pt2", adapters="inputs", inputs=inputs)
    lora = peftc.compile(net, peftc.LoraConfig(target_modules=["0"]))
    with pytest.raises(peftc.ExportError, match="no place for adapters"):
        lora.export(tmp_path / "out", to="hf", adapters="inputs")
    with lora.merged(), pytest.raises(peftc.ExportError, match=r"unmerge_adapter\(\) first"):
        lora.export(tmp_path / "out", to="pt2", adapters="inputs", inputs=inputs)
    assert not (tmp_path / "out").exists()
    assert list(lora.peft_config) == ["default"]
    perturb(lora).export(tmp_path / "out", to="pt2", adapters="inputs", inputs=inputs)
    assert list(lora.peft_config) == ["default"]
    assert peftc.verify(tmp_path / "out").difference < 1e-6


class Alike(nn.Module):
    """Modules whose names differ in case, or in a dot, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.Fc, self.fc, self.a_b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a["b"](self.a_b(self.fc(self.Fc(x))))


def test_every_factor_has_an_input_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = perturb(peftc.compile(Alike(), peftc.LoraConfig(r=2, target_modules=["Fc", "fc", "a_b", "a.b"])))
    inputs = {"x": torch.randn(3, 4)}
    certificate = compiled.export(tmp_path / "out", to="pt2", adapters="inputs", inputs=inputs)
    assert certificate.difference <= 1e-5 * certificate.scale
    assert len(load_file(tmp_path / "out" / "adapters" / "default.safetensors")) == 8


def test_a_base_in_half_precision_keeps_its_adapters_in_full(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    compiled = perturb(peftc.compile(net, peftc.LoraConfig(r=2, target_modules=["0"])))
    inputs = {"input": torch.randn(3, 4, dtype=torch.bfloat16)}
    compiled.export(tmp_path / "out", to="pt2", adapters="inputs", inputs=inputs)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapters" / "default.safetensors").values()} == {
        torch.float32
    }
