"""A merge on disk has the bytes of one in memory: every kind of layer, method and name; and it can be undone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc.merge import fold
from tests.support.checkpoints import (
    adapter_on_disk,
    assert_same_files,
    base_on_disk,
    hashes,
    merged_in_memory,
    on_disk,
)
from tests.support.models import Everything, model_of, token_ids

OURS = ("peftc_merge.json", "peftc_undo")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all linear": ("llama", {"target_modules": "all-linear"}),
    "llama, patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "llama, modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama, rslora, one layer": (
        "llama",
        {"target_modules": ["v_proj"], "use_rslora": True, "layers_to_transform": [1]},
    ),
    "llama, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2, bias=all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2, lora_bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "bert": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "t5, tied": ("t5", {"target_modules": ["q", "v", "wi"]}),
    "bart": ("bart", {"target_modules": "all-linear"}),
    "vit, convolution": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "mixtral, experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "ia3, llama": (
        "llama",
        {"ia3": True, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3, gpt2": ("gpt2", {"ia3": True, "target_modules": ["c_attn"], "feedforward_modules": []}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_a_merge_in_memory_and_the_base_comes_back(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind, fields = CASES[name]
    model = base_on_disk(model_of(kind, dtype), tmp_path)
    adapter = (
        adapter_on_disk(model, tmp_path / "adapter", r=4, **fields)
        if "ia3" not in fields
        else adapter_on_disk(model, tmp_path / "adapter", **fields)
    )
    merged_in_memory(tmp_path / "base", type(model), [adapter], tmp_path / "memory")
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "disk", undo=True, progress=False)
    assert_same_files(tmp_path / "disk", tmp_path / "memory", OURS)
    changed = {k for k, v in hashes(tmp_path / "base").items() if hashes(tmp_path / "disk")[k] != v}
    assert changed
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


@pytest.mark.parametrize("weights", [None, (0.7, -0.4)], ids=["one after the other", "weighted"])
@pytest.mark.parametrize("ia3", [False, True], ids=["lora", "ia3"])
def test_several_adapters(ia3: bool, weights: tuple[float, float] | None, tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama", torch.bfloat16), tmp_path)
    fields: list[dict[str, Any]] = [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["k_proj", "v_proj"]}]
    if ia3:
        fields = [{**one, "ia3": True, "feedforward_modules": []} for one in fields]
    else:
        fields[1] |= {"r": 3, "lora_alpha": 5, "modules_to_save": ["lm_head"]}
    adapters = [adapter_on_disk(model, tmp_path / f"a{i}", seed=i, **one) for i, one in enumerate(fields)]
    merged_in_memory(tmp_path / "base", type(model), adapters, tmp_path / "memory", weights)
    peftc.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "disk", weights=weights, undo=True, progress=False)
    assert_same_files(tmp_path / "disk", tmp_path / "memory", OURS)
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "bert"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
def test_a_tie_is_cut_on_request(kind: str, shard: str, tmp_path: Path) -> None:
    model = base_on_disk(model_of(kind), tmp_path, shard)
    name = {"gpt2": "wte", "gemma3_text": "embed_tokens", "bert": "word_embeddings"}[kind]
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=[name])
    with pytest.raises(peftc.MergeError, match="untie=True"):
        peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "disk", progress=False)
    assert not (tmp_path / "disk").exists()
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = merged_in_memory(
            tmp_path / "base", type(model), [adapter], tmp_path / "memory", untie=True, shard=shard
        )
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "disk", untie=True, undo=True, progress=False)
    loaded = type(model).from_pretrained(tmp_path / "disk", dtype="auto")
    assert not loaded.config.tie_word_embeddings
    expected = dict(merged.state_dict())
    assert {
        key: bool(torch.equal(value, expected[key])) for key, value in loaded.state_dict().items()
    } == dict.fromkeys(expected, True)
    if shard == "5GB":
        assert_same_files(tmp_path / "disk", tmp_path / "memory", OURS)
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


@pytest.mark.parametrize("given", [False, True], ids=["from names", "model="])
def test_modules_of_no_library(given: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    base = on_disk(model, tmp_path / "base")
    names = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]
    adapter = adapter_on_disk(model, tmp_path / "adapter", r=4, target_modules=names, modules_to_save=["head"])
    like = Everything().to("meta") if given else None
    peftc.merge_checkpoint(base, adapter, tmp_path / "disk", undo=True, model=like, progress=False)
    expected = peftc.load(model, adapter).merge_and_unload()
    found = load_file(tmp_path / "disk" / "model.safetensors")
    assert {k: bool(torch.equal(found[k], v)) for k, v in expected.state_dict().items()} == dict.fromkeys(found, True)
    assert not torch.equal(expected(token_ids()), model(token_ids()))
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", model=like, progress=False)
    assert_same_files(tmp_path / "back", base)


def test_weights_of_several_tiles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1500), nn.Linear(1500, 700)).bfloat16()
    base = on_disk(model, tmp_path / "base")
    adapter = adapter_on_disk(model, tmp_path / "adapter", r=16, target_modules=["0", "1"])
    peftc.merge_checkpoint(base, adapter, tmp_path / "disk", undo=True, progress=False)
    found = load_file(tmp_path / "disk" / "model.safetensors")
    expected = peftc.load(model, adapter).merge_and_unload().state_dict()
    assert {k: bool(torch.equal(found[k], v)) for k, v in expected.items()} == dict.fromkeys(found, True)
    log = (tmp_path / "disk" / "peftc_undo" / "model.safetensors.log").stat().st_size
    assert log < 0.4 * (base / "model.safetensors").stat().st_size
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", base)


def test_products_have_the_same_shapes_and_threads_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both decide how a BLAS rounds; too seldom for bytes to show it in a small test."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 200), nn.Linear(200, 3000)).half()
    base = on_disk(model, tmp_path / "base")
    adapter = adapter_on_disk(model, tmp_path / "adapter", r=16, target_modules=["0", "1"])
    real, seen = fold.fold_tile, list[Any]()

    def watched(site: Any, tile: Any, steps: Any, axis: str, part: slice, *out: Any) -> Any:
        seen.append((site.fqn, part.start, part.stop, tile.shape, torch.get_num_threads()))
        return real(site, tile, steps, axis, part, *out)

    monkeypatch.setattr(fold, "fold_tile", watched)
    compiled = peftc.load(model, adapter)
    compiled.merge_adapter()
    in_memory, seen = sorted(seen), []
    assert len(in_memory) > 4
    peftc.merge_checkpoint(base, adapter, tmp_path / "disk", progress=False)
    assert sorted(seen) == in_memory


def test_an_embedding_that_the_adapter_brings(tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama", torch.bfloat16), tmp_path)
    other = model_of("llama", torch.bfloat16)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    compiled = peftc.compile(
        other, peftc.LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    )
    compiled.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.warns(UserWarning, match="brings its own"):
        merged_in_memory(tmp_path / "base", type(model), [tmp_path / "adapter"], tmp_path / "memory")
    with pytest.warns(UserWarning, match=r"brings its own model\.embed_tokens\.weight"):
        peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", undo=True, progress=False)
    assert_same_files(tmp_path / "disk", tmp_path / "memory", OURS)
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


def test_what_training_started_from_may_be_missing(tmp_path: Path) -> None:
    """As in peft's files: it is computed from the weight. The log has all of what undoing could not compute."""
    model = base_on_disk(model_of("llama"), tmp_path)
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa")
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(("A0", "B0"))}, file)
    merged_in_memory(tmp_path / "base", type(model), [adapter], tmp_path / "memory")
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "disk", undo=True, progress=False)
    assert_same_files(tmp_path / "disk", tmp_path / "memory", OURS)
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back", progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "base")


def test_other_files_come_along(tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama"), tmp_path)
    base = tmp_path / "base"
    (base / "tokenizer.json").write_text("{}")
    (base / "chat").mkdir()
    (base / "chat" / "template.jinja").write_text("hello")
    (base / "pytorch_model.bin").write_bytes(b"weights from before the merge")
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["q_proj"])
    peftc.merge_checkpoint(base, adapter, tmp_path / "disk", progress=False)
    assert (tmp_path / "disk" / "chat" / "template.jinja").read_text() == "hello"
    assert (tmp_path / "disk" / "tokenizer.json").exists()
    assert not (tmp_path / "disk" / "pytorch_model.bin").exists()
    record = json.loads((tmp_path / "disk" / "peftc_merge.json").read_text())
    assert (record["base"], record["adapters"]) == (str(base), [str(adapter)])
