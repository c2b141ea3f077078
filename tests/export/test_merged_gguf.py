"""The base's GGUF file with an adapter merged into it, as transformers reads it, and what is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import peftc
from peftc.export.merged_gguf import _kind
from tests.support.adapters import perturb
from tests.support.gguf_files import write_llama
from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
SPEC: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]}


def llama(**more: Any) -> Any:
    """Sizes that blocks of 32 divide."""
    model = small_model("llama", "LlamaForCausalLM", intermediate_size=64, num_hidden_layers=2, **more)
    assert model is not None
    return model


def read(folder: Path, file: str) -> Any:
    """The model as transformers reads the file."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_transformers_reads_the_live_model(kind: str, tied: bool, tmp_path: Path) -> None:
    write_llama(llama(tie_word_embeddings=tied), tmp_path / "base.gguf", kind)
    base = read(tmp_path, "base.gguf")
    torch.manual_seed(0)
    compiled = perturb(peftc.compile(base, peftc.LoraConfig(**SPEC)))
    before = {name: value.clone() for name, value in compiled.base.state_dict().items()}
    made = compiled.export(tmp_path / "out", "gguf", adapters="merged", gguf=tmp_path / "base.gguf")
    rounding = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}[kind]
    assert made.difference <= rounding * made.scale
    assert (made.adapters, made.of) == ("merged", "merged weights")
    found = logits(read(tmp_path / "out", "model.gguf"))
    torch.testing.assert_close(found, logits(compiled), rtol=0, atol=1e-6 if kind == "F32" else 30 * rounding)
    assert float((found - logits(base)).abs().max()) > 0.05
    now = compiled.base.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert peftc.verify(tmp_path / "out") == made


def test_nothing_else_of_the_file_changes(tmp_path: Path) -> None:
    base = llama()
    write_llama(base, tmp_path / "base.gguf", "Q8_0", **{"made.up": 7})
    compiled = perturb(peftc.compile(base, peftc.LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1])))
    compiled.export(tmp_path / "out", "gguf", adapters="merged", gguf=tmp_path / "base.gguf")
    old, new = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "out" / "model.gguf")
    assert list(new) == list(old)
    assert [name for name in old if not np.array_equal(old[name].data, new[name].data)] == ["blk.1.attn_v.weight"]
    assert new["blk.1.attn_v.weight"].tensor_type.name == "F16"
    fields = [gguf.GGUFReader(path).fields for path in (tmp_path / "base.gguf", tmp_path / "out" / "model.gguf")]
    said = [{name: one.contents() for name, one in field.items() if not name.startswith("GGUF.")} for field in fields]
    assert said[0] == said[1]
    assert said[1]["made.up"] == 7
    assert said[1]["general.tags"] == ["a", "b"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_changed_tensors_can_be_quantised_again(kind: str, tmp_path: Path) -> None:
    base = llama()
    write_llama(base, tmp_path / "base.gguf", kind)
    compiled = perturb(peftc.compile(base, peftc.LoraConfig(**SPEC)))
    plain = compiled.export(tmp_path / "f16", "gguf", adapters="merged", gguf=tmp_path / "base.gguf")
    again = compiled.export(tmp_path / "again", "gguf", adapters="merged", gguf=tmp_path / "base.gguf", quantized=True)
    kinds = {tensor.tensor_type.name for tensor in tensors(tmp_path / "again" / "model.gguf").values()}
    assert kinds == {kind, "F32"}
    assert plain.difference <= 2**-11 * plain.scale < again.difference < 0.2 * again.scale
    with compiled.merged():
        weight = compiled.base.get_parameter("model.layers.0.mlp.down_proj.weight")
        expected = gguf.quants.quantize(weight.numpy(), getattr(gguf.GGMLQuantizationType, kind))
    np.testing.assert_array_equal(tensors(tmp_path / "again" / "model.gguf")["blk.0.ffn_down.weight"].data, expected)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tie_that_merging_cuts_is_cut_in_the_file(target: str, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    write_llama(base, tmp_path / "base.gguf")
    compiled = perturb(peftc.compile(base, peftc.LoraConfig(r=2, target_modules=[target])))
    compiled.export(tmp_path / "out", "gguf", adapters="merged", gguf=tmp_path / "base.gguf")
    new = tensors(tmp_path / "out" / "model.gguf")
    assert set(new) == {*tensors(tmp_path / "base.gguf"), "output.weight"}
    with compiled.merged(untie=True):
        state = compiled.base.state_dict()
        ends = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
        for name, own in ends.items():
            np.testing.assert_allclose(new[name].data, state[own].numpy(), rtol=1e-3, atol=1e-4)


def test_norms_and_adapters_merged_before(tmp_path: Path) -> None:
    base = llama()
    write_llama(base, tmp_path / "base.gguf")
    compiled = perturb(peftc.compile(base, peftc.LNTuningConfig(target_modules=["input_layernorm"])))
    compiled.merge_adapter()
    compiled.export(tmp_path / "out", "gguf", adapters="merged", gguf=tmp_path / "base.gguf")
    assert compiled.merged_adapters == ["default"]
    found = logits(read(tmp_path / "out", "model.gguf"))
    torch.testing.assert_close(found, logits(compiled), rtol=0, atol=1e-6)


def refused(tmp_path: Path, message: str, base: Any = None, spec: Any = None, **options: Any) -> None:
    compiled = perturb(peftc.compile(llama() if base is None else base, spec or peftc.LoraConfig(**SPEC)))
    with pytest.raises(peftc.ExportError, match=message):
        compiled.export(tmp_path / "out", **{"to": "gguf", "adapters": "merged", **options})
    assert not list((tmp_path / "out").glob("*"))


def test_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    write_llama(llama(), file)
    refused(tmp_path, r"give gguf=, the base's own GGUF file.*export\(folder\) writes the merged checkpoint")
    refused(tmp_path, "are for to='gguf', adapters='merged'", to="hf", gguf=file)
    refused(tmp_path, "no GGUF file that can be read", gguf=tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("no such thing" * 9)
    refused(tmp_path, "no GGUF file that can be read", gguf=tmp_path / "text.gguf")
    refused(tmp_path, r"attn_q.weight is \(32, 32\) there, and \(64, 32\)", base=llama(head_dim=16), gguf=file)
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    refused(tmp_path, r"is not the base's there \(they differ by 1", base=other, gguf=file)
    write_llama(llama(), tmp_path / "part.gguf", **{"split.count": 2})
    refused(tmp_path, "join them first", gguf=tmp_path / "part.gguf")
    gpt2 = small_model("gpt2", "GPT2LMHeadModel")
    refused(tmp_path, "is of architecture llama, and the model is gpt2", gpt2, peftc.LoraConfig(r=2), gguf=file)
    big = llama()
    write_llama(big, tmp_path / "half.gguf", "F16")
    with torch.no_grad():
        big.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = 1e6
    refused(tmp_path, "is not the base's there", base=big, gguf=tmp_path / "half.gguf")


def test_types_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    write_llama(llama(), tmp_path / "base.gguf")
    held = tensors(tmp_path / "base.gguf")["blk.0.attn_q.weight"]
    held = held._replace(tensor_type=gguf.GGMLQuantizationType.Q4_K)
    with pytest.raises(peftc.ExportError, match=r"blk.0.attn_q.weight is Q4_K, which the package gguf can't write"):
        _kind(gguf, held.name, held, torch.ones(2, 256), True)
    assert _kind(gguf, held.name, held, torch.ones(2, 256), False).name == "F16"
