"""Adapters of transformers 4, trained on a linear for each expert, on the fused experts of transformers 5."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftc
from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 8]])
MOE = {
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 0, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "num_experts_per_token": 2, "moe_num_experts": 4, "moe_k": 2,
}  # fmt: skip
PROJ, W = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
# By model type: its class, what the block was called, and its linears.
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "mlp", PROJ),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "mlp", PROJ),
    "mixtral": ("MixtralForCausalLM", "block_sparse_moe", W),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "mlp", PROJ),
    "glm4_moe": ("Glm4MoeForCausalLM", "mlp", PROJ),
    "olmoe": ("OlmoeForCausalLM", "mlp", PROJ),
}


def model_of(family: str) -> Any:
    more = {"qwen2_moe": {"layer_types": ["full_attention"]}, "deepseek_v3": {"head_dim": 4}}.get(family, {})
    model = small_model(family, FAMILIES[family][0], **{**MOE, **more})
    assert model is not None
    return model


def written(folder: Path, family: str, only: Any = None, **config: Any) -> tuple[Any, Any]:
    """A base, and one whose weights have what the file in `folder` says, as float64 algebra."""
    _, block, names = FAMILIES[family]
    base, want = model_of(family), model_of(family)
    experts = want.model.layers[0].mlp.experts
    count, rows, width = experts.gate_up_proj.shape
    sizes = dict(zip(names, ((width, rows // 2), (width, rows // 2), (rows // 2, width)), strict=True))
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [*names, "o_proj"],
    }
    spec = peftc.load_spec({**fields, **config})
    for e in range(count):
        delta = {name: torch.zeros(out, size, dtype=torch.float64) for name, (size, out) in sizes.items()}
        for name, (size, out) in sizes.items():
            if only is not None and not only(e, name):
                continue
            fqn = f"model.layers.0.{block}.experts.{e}.{name}"
            r = spec.rank_for(fqn)
            a, b = torch.randn(r, size), 0.5 * torch.randn(out, r)
            state |= {f"base_model.model.{fqn}.lora_A.weight": a, f"base_model.model.{fqn}.lora_B.weight": b}
            delta[name] = spec.scaling_for(fqn) * b.double() @ a.double()
        with torch.no_grad():
            experts.gate_up_proj[e] += torch.cat([delta[names[0]], delta[names[1]]]).float()
            experts.down_proj[e] += delta[names[2]].float()
    o = want.model.layers[0].self_attn.o_proj
    a, b = torch.randn(4, o.in_features), torch.randn(o.out_features, 4)
    state |= {f"base_model.model.model.layers.0.self_attn.o_proj.lora_{x}.weight": v for x, v in (("A", a), ("B", b))}
    with torch.no_grad():
        o.weight += spec.scaling_for("model.layers.0.self_attn.o_proj") * b @ a
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return base, want


def close(model: Any, want: Any) -> None:
    torch.testing.assert_close(model(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "gates alone": {"only": lambda e, name: name in ("gate_proj", "w1")},
    "one expert": {"only": lambda e, name: e == 2},
    "ranks that differ": {"rank_pattern": {"experts.1.down_proj": 2, "experts.2.gate_proj": 6}},
    "rslora": {"use_rslora": True, "alpha_pattern": {"experts.0.up_proj": 3}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_they_load_in_memory_and_merge_on_disk(family: str, variant: str, tmp_path: Path) -> None:
    base, want = written(tmp_path / "a", family, **VARIANTS[variant])
    assert not torch.allclose(base(IDS).logits, want(IDS).logits, atol=1e-3)
    compiled = peftc.load(base, tmp_path / "a")
    close(compiled, want)
    with compiled.merged():
        close(compiled, want)
    compiled.load_adapter(tmp_path / "a", "again")
    compiled.set_adapter("again")
    close(compiled, want)
    compiled.save_pretrained(tmp_path / "now", selected_adapters=["default"])
    close(peftc.load(model_of(family), tmp_path / "now"), want)
    base.save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "merged").eval()
    close(merged, want)


class Expert(torch.nn.Module):
    """Linears by the names that a file's keys have."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            self.add_module(name, linear)


def as_transformers_4(model: Any, family: str) -> torch.nn.Module:
    """The first layer's experts and projection of `model` with the modules that transformers 4 had."""
    _, block, names = FAMILIES[family]
    layer, tree = model.model.layers[0], torch.nn.Module()
    experts = layer.mlp.experts
    half = experts.gate_up_proj.shape[1] // 2
    parts = (experts.gate_up_proj[:, :half], experts.gate_up_proj[:, half:], experts.down_proj)
    listed = [Expert({name: part[e].detach() for name, part in zip(names, parts, strict=True)}) for e in range(4)]
    tree.model = torch.nn.Module()
    tree.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    at = torch.nn.Module()
    at.experts = torch.nn.ModuleList(listed)
    tree.model.layers[0].add_module(block, at)
    tree.model.layers[0].self_attn = Expert({"o_proj": layer.self_attn.o_proj.weight.detach()})
    return tree


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_they_are_written_back_as_peft_of_old_reads_them(family: str, rslora: bool, tmp_path: Path) -> None:
    import peft

    base = model_of(family)
    fields: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "alpha_pattern": {"experts.down_proj": 3}, "rank_pattern": {"experts.gate_up_proj": 2},
    }  # fmt: skip
    compiled = peftc.compile(base, peftc.LoraConfig(**fields))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    want = compiled(IDS).logits
    compiled.save_pretrained(tmp_path / "old", form="per_expert")
    old: Any = peft.PeftModel.from_pretrained(as_transformers_4(base, family), tmp_path / "old")
    assert sum("lora_A" in name for name, _ in old.named_parameters()) == 13
    plain = old.merge_and_unload()
    compiled.merge_adapter()
    expected = dict(as_transformers_4(compiled.base, family).named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    close(peftc.load(model_of(family), tmp_path / "old"), lambda ids: type("Out", (), {"logits": want}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_the_ranks_are_those_of_the_file(variant: str, tmp_path: Path) -> None:
    base, want = written(tmp_path / "a", "mixtral", **VARIANTS[variant])
    peftc.load(base, tmp_path / "a").save_pretrained(tmp_path / "back", form="per_expert")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "back"))
    assert set(before) <= set(after), "an expert that the file left out has zeros"
    if variant != "ranks that differ":
        assert {key: after[key].shape for key in before} == {key: tensor.shape for key, tensor in before.items()}
    close(peftc.load(model_of("mixtral"), tmp_path / "back"), want)


def test_where_names_would_mean_more_targets_are_told_by_full_name(tmp_path: Path) -> None:
    base = model_of("deepseek_v3")
    spec = peftc.LoraConfig(target_parameters=["experts.down_proj"], target_modules=["o_proj"])
    peftc.compile(base, spec).save_pretrained(tmp_path / "a", form="per_expert")
    chosen = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(chosen, "model.layers.0.mlp.experts.3.down_proj")
    assert not re.fullmatch(chosen, "model.layers.0.mlp.shared_experts.down_proj")


def test_what_has_no_linears_for_experts_says_so(tmp_path: Path) -> None:
    llama = small_model("llama", "LlamaForCausalLM")
    with pytest.raises(peftc.CheckpointError, match="adapts no fused experts; save it without form"):
        peftc.compile(llama, peftc.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path, form="per_expert")
    spec: Any = peftc.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(peftc.CheckpointError, match="is IA3; adapters of linears for each expert are LoRA's"):
        peftc.compile(llama, spec).save_pretrained(tmp_path, form="per_expert")
    fused = small_model("granitemoe", "GraniteMoeForCausalLM", **MOE)
    assert fused is not None
    spec = peftc.LoraConfig(target_parameters=["experts.down_proj"])
    with pytest.raises(peftc.CheckpointError, match="in this model's checkpoints, not a linear for each expert"):
        peftc.compile(fused, spec).save_pretrained(tmp_path, form="per_expert")
    assert not list(tmp_path.iterdir())


def test_a_linear_that_no_expert_has_is_unexpected(tmp_path: Path) -> None:
    base, _ = written(tmp_path / "a", "qwen3_moe")
    file = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if ".3.down_proj" in key)
    state[key.replace("down_proj", "side_proj")] = state[key].clone()
    save_file(state, file)
    with pytest.raises(peftc.CheckpointError, match="side_proj"):
        peftc.load(base, tmp_path / "a")


def test_linears_of_single_experts_are_merged_on_disk_and_undone(tmp_path: Path) -> None:
    base, want = written(tmp_path / "a", "qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged", undo=True)
    close(transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged").eval(), want)
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    first, again = (tmp_path / folder / "model.safetensors" for folder in ("base", "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "hunyuan_v1_moe", "dots1", "qwen2_moe", "llama"])
def test_a_warning_says_where_peft_reads_a_file_otherwise(family: str, tmp_path: Path) -> None:
    import peft

    cls = {"hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM", "dots1": "Dots1ForCausalLM", "llama": "LlamaForCausalLM"}
    base, again = (
        model_of(family) if family in FAMILIES else small_model(family, cls[family], **MOE) for _ in range(2)
    )
    assert base is not None
    assert again is not None
    compiled = peftc.compile(base, peftc.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled.save_pretrained(tmp_path)
    warned = any("for linears of its fused experts" in str(one.message) for one in caught)
    theirs: Any = peft.PeftModel.from_pretrained(again, str(tmp_path))
    assert warned != torch.allclose(theirs(IDS).logits, compiled(IDS).logits, atol=1e-5)
    close(peftc.load(model_of(family) if family in FAMILIES else base, tmp_path), compiled)
