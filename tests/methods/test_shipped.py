"""Every method that adapts weights, on a model of transformers: merged on disk, compiled by torch, served as LoRA."""

import copy
from pathlib import Path

import peft
import pytest
import torch

import peftc
from tests.support.interchange import perturbed, quietly
from tests.support.models import tiny, token_ids

TARGETS = ("q_proj", "v_proj", "down_proj")
SPECS: dict[str, peftc.AdapterSpec] = {
    "LoHa": peftc.LoHaConfig(r=2),
    "LoKr": peftc.LoKrConfig(r=2),
    "OFT": peftc.OFTConfig(oft_block_size=8),
    "OFT exactly": peftc.OFTConfig(oft_block_size=8, use_cayley_neumann=False),
    "BOFT": peftc.BOFTConfig(boft_n_butterfly_factor=2),
    "HRA": peftc.HRAConfig(r=4),
    "MiSS": peftc.MissConfig(r=7),
    "Bat": peftc.MissConfig(r=8, init_weights="bat"),
    "RoAd": peftc.RoadConfig(group_size=4),
    "GraLoRA": peftc.GraloraConfig(r=4),
    "C3A": peftc.C3AConfig(block_size=8),
    "HiRA": peftc.HiraConfig(r=2),
    "DeLoRA": peftc.DeloraConfig(r=2),
    "DEFT": peftc.DeftConfig(r=2),
    "GLoRA": peftc.GloraConfig(r=2),
    "OSF": peftc.OSFConfig(),
    "PEANuT": peftc.PeanutConfig(r=4, depth=1),
    "PSOFT": peftc.PsoftConfig(r=4),
    "FRoD": peftc.FrodConfig(),
    "FRoD not saved": peftc.FrodConfig(save_projection=False),
    "AdaMSS": peftc.AdamssConfig(subspace_rank=2),
    "PVeRA": peftc.PveraConfig(r=8),
    "Super-Tuning": peftc.SupertuningConfig(sparsity=0.9, r=2),
    "TinyLoRA": peftc.TinyLoraConfig(u=9),
    "Uni-LoRA": peftc.UniLoraConfig(theta_d_length=99),
    "RandLoRA": peftc.RandLoraConfig(r=4, randlora_alpha=8),
    "VB-LoRA": peftc.VBLoRAConfig(r=2, num_vectors=20, vector_length=8),
    "WaveFT": peftc.WaveFTConfig(n_frequency=99),
}
# Of those that torch compiles, which takes some seconds each.
FAST = ("LoHa", "OFT", "FRoD", "WaveFT")
PRODUCTS = ("MiSS", "DeLoRA", "OSF", "RandLoRA", "VB-LoRA", "Uni-LoRA")
IDS = token_ids(2, 7, 64)


def adapted(name: str, **sizes: int) -> tuple[torch.nn.Module, peftc.CompiledModel, torch.Tensor]:
    """A model, the same with a trained adapter, and what that gives."""
    model = tiny("llama", **sizes)
    ours = perturbed(peftc.compile(model, SPECS[name].model_copy(update={"target_modules": TARGETS})), 1)
    y = ours(IDS).logits.detach()
    assert not torch.allclose(y, model(IDS).logits, atol=1e-3)
    return model, ours, y


@pytest.mark.parametrize("name", SPECS)
def test_it_is_merged_on_disk_and_undone_byte_for_byte(name: str, tmp_path: Path) -> None:
    model, ours, y = adapted(name)
    model.save_pretrained(tmp_path / "base")
    ours.save_pretrained(tmp_path / "adapter")
    folders = [tmp_path / folder for folder in ("base", "adapter", "merged")]
    peftc.merge_checkpoint(*folders, undo=True, progress=False)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "merged")(IDS).logits, y, rtol=1e-4, atol=1e-5)
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again", progress=False)
    first, again = (tmp_path / folder / "model.safetensors" for folder in ("base", "again"))
    assert first.read_bytes() == again.read_bytes()
    files = [folder / "adapter_model.safetensors" for folder in (folders[1], folders[2] / "peftc_undo" / "adapter0")]
    assert files[0].read_bytes() == files[1].read_bytes(), "the adapter is kept as it was given"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else (pytest.mark.slow,)) for name in SPECS]
)
def test_it_is_one_graph_for_torch_compile(name: str) -> None:
    _, ours, y = adapted(name, num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(ours.base, backend="aot_eager", fullgraph=True)
    found = compiled(IDS).logits
    torch.testing.assert_close(found, y)
    found.square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", SPECS)
def test_what_adds_products_is_served_as_lora(name: str, tmp_path: Path) -> None:
    model, ours, y = adapted(name)
    if name not in PRODUCTS:
        with pytest.raises(peftc.CheckpointError, match=r"(servers take LoRA|is no sum of products)"):
            ours.save_pretrained(tmp_path, form="serving")
        return
    ours.save_pretrained(tmp_path, form="serving")
    assert peftc.load_spec(tmp_path).peft_type == "LORA"
    theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, y, rtol=1e-4, atol=1e-5)


ASKING: dict[str, peftc.AdapterSpec] = {
    "Poly": peftc.PolyConfig(target_modules=TARGETS, r=4, n_tasks=3, n_skills=2, n_splits=2, task_type="CAUSAL_LM"),
    "multitask": peftc.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=3, num_ranks=2, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKING)
def test_what_asks_about_the_call_is_compiled_around_it(name: str) -> None:
    """In several graphs, and in none anew for other tasks; of the compiled model, as its base is not told of the call."""
    ours = perturbed(peftc.compile(tiny("llama"), ASKING[name]), 2).eval()
    ids, graphs = token_ids(4, 7, 64), list[int]()

    def count(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(len(module.graph.nodes))
        return module

    torch._dynamo.reset()
    fast, made = torch.compile(ours, backend=count), 0
    for tasks in ([0, 2, 1, 1], [1, 0, 2, 0], [2, 2, 2, 2]):
        given = {"input_ids": ids, "task_ids": torch.tensor(tasks)}
        expected, found = ours(**given).logits, fast(**given).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        made = made or len(graphs)
        assert 0 < len(graphs) == made
    found.square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    with pytest.raises(peftc.AdapterError, match="call that, not its base"):
        torch.compile(ours.base, backend="eager")(**given)
