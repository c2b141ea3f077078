"""Adapters for llama.cpp and MLX, and what runtimes make of PEFT's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

import peftc
from tests.support.adapters import perturb
from tests.support.programs import program_model

FIELDS: dict[str, Any] = {
    "r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "use_rslora": True,
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3},
}  # fmt: skip


def compiled_llama(**fields: Any) -> peftc.CompiledModel:
    torch.manual_seed(0)
    return perturb(peftc.compile(program_model("llama"), peftc.LoraConfig(**{**FIELDS, **fields})))


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of the rows of queries and keys (convert_hf_to_gguf.py), which ggml's rotation wants."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_adapter_changes_weights_as_the_live_one_does(tmp_path: Path) -> None:
    """llama.cpp adds alpha / rank of each tensor times B·A to its own, permuted weights."""
    compiled = compiled_llama()
    certificate = compiled.export(tmp_path / "out", to="gguf")
    assert certificate.adapters == "beside"
    assert certificate.difference <= 1e-6 * certificate.scale
    reader = GGUFReader(tmp_path / "out" / "default.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == "llama"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * len(compiled.plan.edits)
    before = {name: value.double().numpy() for name, value in compiled.base.state_dict().items()}
    compiled.merge_adapter()
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    config: Any = compiled.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for module, name in names.items():
        weight = f"model.layers.0.{module}.weight"
        merged = compiled.base.state_dict()[weight].double().numpy()
        a, b = (tensors[f"blk.0.{name}.weight.lora_{end}"].astype(np.float64) for end in "ab")
        own, expected = (permuted(w, heads[name]) if name in heads else w for w in (before[weight], merged))
        np.testing.assert_allclose(own + alpha / b.shape[1] * (b @ a), expected, atol=1e-6)
    assert peftc.verify(tmp_path / "out") == certificate


def test_an_embedding_lies_as_llama_cpp_looks_it_up(tmp_path: Path) -> None:
    model = program_model("llama")
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=3, target_modules=["embed_tokens"])))
    compiled.export(tmp_path / "out", to="gguf")
    shapes = {t.name: t.data.shape for t in GGUFReader(tmp_path / "out" / "default.gguf").tensors}
    assert shapes == {"token_embd.weight.lora_a": (64, 3), "token_embd.weight.lora_b": (32, 3)}


def test_an_mlx_adapter_is_what_mlx_lm_adds(tmp_path: Path) -> None:
    """y + scale · (x·lora_a)·lora_b."""
    compiled = compiled_llama()
    assert compiled.export(tmp_path / "out", to="mlx").difference <= 1e-6
    folder = tmp_path / "out" / "default"
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapters.safetensors"),
    )
    how = config["lora_parameters"]
    assert sorted(how["keys"]) == ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    assert (config["num_layers"], how["rank"], how["scale"]) == (1, 4, 1.0)
    site = "model.layers.0.self_attn.q_proj"
    x, module = torch.randn(2, 32), compiled.base.get_submodule(site)
    base = torch.nn.functional.linear(x, module.weight)  # type: ignore[arg-type]
    theirs = base + how["scale"] * (x @ tensors[f"{site}.lora_a"]) @ tensors[f"{site}.lora_b"]
    torch.testing.assert_close(theirs, module(x))


def test_what_such_files_cant_say_is_refused_with_what_can(tmp_path: Path) -> None:
    tied = peftc.compile(program_model("gpt2"), peftc.LoraConfig(target_modules=["wte"]))
    for compiled, to, reason in (
        (compiled_llama(use_dora=True), "gguf", r"no sum of products.*export\(folder\) writes the merged model"),
        (compiled_llama(modules_to_save=["norm"]), "mlx", "saved whole"),
        (peftc.compile(program_model("opt"), peftc.LoraConfig()), "gguf", "opt is none of llama, .*merged checkpoint"),
        (compiled_llama(target_modules=["embed_tokens"], rank_pattern={}, alpha_pattern={}), "mlx", "is in no layer"),
        (tied, "gguf", "shares its weight"),
    ):
        with pytest.raises(peftc.ExportError, match=reason):
            compiled.export(tmp_path / "out", to=to)  # type: ignore[arg-type]
        assert not list((tmp_path / "out").glob("*"))
    compiled = compiled_llama()
    with pytest.raises(peftc.ExportError, match="gguf and mlx take adapters beside a base"):
        compiled.export(tmp_path / "out", to="mlx", adapters="merged")
    compiled.enable_adapters(False)
    with pytest.raises(peftc.ExportError, match="nothing to write"):
        compiled.export(tmp_path / "out", to="gguf")


def test_preflight_says_who_takes_what(tmp_path: Path) -> None:
    compiled_llama().save_pretrained(tmp_path / "patterns")
    compiled_llama().save_pretrained(tmp_path / "serving", form="serving")
    compiled_llama(use_dora=True).save_pretrained(tmp_path / "dora")
    takes = {
        name: {verdict.runtime for verdict in peftc.preflight(tmp_path / name) if verdict.takes}
        for name in ("patterns", "serving", "dora")
    }
    assert takes == {"patterns": {"vllm"}, "serving": {"vllm", "sglang", "tensorrt-llm"}, "dora": set()}
    (verdict,) = peftc.preflight(tmp_path / "dora", "vllm")
    assert str(verdict).startswith("vllm: does not take it, because of use_dora=True. Instead: merge it")
    (verdict,) = peftc.preflight(tmp_path / "patterns", "llama.cpp")
    assert 'compiled.export(folder, to="gguf")' in verdict.instead
    with pytest.raises(peftc.ExportError, match="known are vllm"):
        peftc.preflight(tmp_path / "dora", "ollama")
    with pytest.raises(peftc.CheckpointError):
        peftc.preflight(tmp_path)
    prompt = peftc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peftc.compile(program_model("llama"), prompt).save_pretrained(tmp_path / "prompt")
    (verdict,) = peftc.preflight(tmp_path / "prompt", "vllm")
    assert "no part of a weight" in str(verdict)
    assert "merge" not in verdict.instead
    (tmp_path / "dora" / "adapter_config.json").write_text("[]")
    with pytest.raises(peftc.CheckpointError, match="holds no object"):
        peftc.preflight(tmp_path / "dora")
