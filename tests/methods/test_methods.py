"""The contract carries methods that nobody thought of when it was made: shared, integer and seeded tensors, norms, rows."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftc
from peftc.registry import rules
from peftc.rule import Rule
from peftc.testing import check_rule
from tests.methods import dora, ln_tuning, loha, oft, token_rows, vera
from tests.support.models import tiny, token_ids

METHODS: dict[str, Rule[Any]] = {
    "loha": loha.Loha(),
    "oft": oft.Oft(),
    "dora": dora.Dora(),
    "vera": vera.Vera(),
    "ln_tuning": ln_tuning.LnTuning(),
    "token_rows": token_rows.TokenRows(),
}
INSTALLED = {type(rule).__name__: rule for rule in rules() if type(rule).weight is not Rule.weight}
# For methods whose spec has to say more than where.
TOKENS = peftc.TrainableTokensConfig(token_indices=[4, 1])

# For rules whose spec does not say them by default, or whose default sizes are over those of the small sites.
SPECS: dict[str, peftc.AdapterSpec] = {
    "TokenRowsEmbedding": TOKENS,
    "TokenRowsLinear": TOKENS,
    "Shira": peftc.ShiraConfig(r=2),
    "VBLoRA": peftc.VBLoRAConfig(num_vectors=5, vector_length=2, init_vector_bank_bound=0.5),
    "AdaLora": peftc.AdaLoraConfig(total_step=10),
    "FourierFT": peftc.FourierFTConfig(n_frequency=10),
    "Miss": peftc.MissConfig(r=2),
    "Bat": peftc.MissConfig(r=2, init_weights="bat"),
    "Road": peftc.RoadConfig(group_size=2),
    "C3A": peftc.C3AConfig(block_size=2),
    "LoftqLinear": peftc.LoraConfig(r=2, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    "QaloraLinear": peftc.LoraConfig(r=2, use_qalora=True, qalora_group_size=4),
    "BdLoraLinear": peftc.LoraConfig(r=2, use_bdlora={"target_modules_bd_b": ["site"], "nblocks": 2}),
    "KasaLinear": peftc.LoraConfig(r=2, kasa_config={}),
    "Deft": peftc.DeftConfig(r=2),
    "UniLora": peftc.UniLoraConfig(theta_d_length=20, init_weights=False),
    "Psoft": peftc.PsoftConfig(r=3),
    "Adamss": peftc.AdamssConfig(num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, use_asa=True),
    "Supertuning": peftc.SupertuningConfig(sparsity=0.7, r=2),
    "WaveFT": peftc.WaveFTConfig(n_frequency=10),
    "Peanut": peftc.PeanutConfig(r=4, depth=1),
    "LoraTied": peftc.LoraConfig(r=2, ensure_weight_tying=True),
    "AloraLinear": peftc.LoraConfig(r=2, alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    **{f"Dora{op}": peftc.LoraConfig(use_dora=True) for op in ("Linear", "Embedding", "Conv")},
}


# Of rules that their spec has do something else, which is to keep the laws too.
OTHERWISE: dict[str, tuple[str, peftc.AdapterSpec]] = {
    "LoRA with a bias": ("LoraLinear", peftc.LoraConfig(r=2, lora_bias=True)),
    "LoRA of a convolution with a bias": ("LoraConv", peftc.LoraConfig(r=2, lora_bias=True)),
    "PiSSA": ("LoraLinear", peftc.LoraConfig(r=2, init_lora_weights="pissa")),
    "IA3 of inputs": ("IA3Linear", peftc.IA3Config(feedforward_modules=["site"])),
    "IA3 of a convolution's inputs": ("IA3Conv", peftc.IA3Config(feedforward_modules=["site"])),
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for rule in METHODS.values():
        peftc.register(rule)
    yield
    for rule in METHODS.values():
        peftc.unregister(rule)


@pytest.mark.parametrize("name", [*METHODS, *INSTALLED])
def test_every_rule_keeps_the_laws(name: str) -> None:
    done = check_rule({**METHODS, **INSTALLED}[name], SPECS.get(name))
    # Activated LoRA is no weight, so four of the laws say nothing of it.
    assert len(done) >= (7 if name == "AloraLinear" else 11)


@pytest.mark.parametrize("what", OTHERWISE)
def test_every_form_that_a_spec_may_ask_for_keeps_the_laws(what: str) -> None:
    name, spec = OTHERWISE[what]
    assert len(check_rule(INSTALLED[name], spec)) >= 29


@pytest.mark.parametrize("name", METHODS)
def test_each_is_one_short_file(name: str) -> None:
    assert len((Path(__file__).parent / f"{name}.py").read_text().splitlines()) <= 40


def moved(compiled: peftc.CompiledModel) -> peftc.CompiledModel:
    """The adapter as if it had been trained."""
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return compiled


class TestAgainstPeft:
    """The same tensors in peft give the same function."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()

    def theirs(self, model: nn.Module, config: Any, renamed: dict[str, Tensor]) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
        state = other.state_dict()
        for key, value in renamed.items():
            assert state[key].shape == value.shape, key
            state[key].copy_(value)
        return other

    def test_dora(self, model: nn.Module) -> None:
        compiled = moved(peftc.compile(model, dora.DoraConfig(r=2, target_modules=["0", "2"])))
        names = {"dora_A.weight": "lora_A.default.weight", "dora_B.weight": "lora_B.default.weight"}
        magnitude = "lora_magnitude_vector.default.weight"
        renamed = {}
        for key, value in compiled.adapter_state_dict().items():
            site, _, tail = key.removeprefix("base_model.model.").partition(".")
            new = names.get(tail, magnitude)
            renamed[f"base_model.model.{site}.{new}"] = value.flatten() if new == magnitude else value
        config = peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["0", "2"])
        x = torch.randn(3, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), self.theirs(model, config, renamed)(x))

    def test_loha(self, model: nn.Module) -> None:
        compiled = moved(peftc.compile(model, loha.LohaConfig(r=2, alpha=3.0, target_modules=["0", "2"])))
        renamed = {f"{key}.default": value for key, value in compiled.adapter_state_dict().items()}
        x = torch.randn(3, 8, dtype=torch.float64)
        config = peft.LoHaConfig(r=2, alpha=3, target_modules=["0", "2"])
        torch.testing.assert_close(compiled(x), self.theirs(model, config, renamed)(x))


def test_token_rows_of_tied_ends_stay_the_same_rows() -> None:
    """The head reads what the embedding writes: one tensor, trained through both, and both merge to the same."""
    model, ids = tiny("gpt2"), torch.tensor([[1, 5, 3, 7]])
    spec = token_rows.TokenRowsConfig(target_modules=["wte", "lm_head"])
    compiled = peftc.compile(model, spec)
    assert torch.equal(compiled(ids).logits, model(ids).logits)
    trained = [name for name, p in compiled.named_parameters() if p.requires_grad]
    assert trained == ["base.token_rows.default"]
    compiled(ids, labels=ids).loss.backward()
    y = moved(compiled)(ids).logits
    assert not torch.allclose(y, model(ids).logits, atol=1e-3)
    compiled.merge_adapter(untie=True)
    torch.testing.assert_close(compiled(ids).logits, y)
    assert torch.equal(compiled.base.lm_head.weight, compiled.base.transformer.wte.weight)
    rows = compiled.base.lm_head.weight
    assert torch.equal(rows[[1, 3]], compiled.base.token_rows["default"])
    assert torch.equal(rows[[0, 2, 5]], model.lm_head.weight[[0, 2, 5]])
    compiled.unmerge_adapter()
    assert torch.equal(compiled(ids).logits, y)


def test_a_method_is_sized_over_all_its_sites() -> None:
    model = tiny("llama")
    compiled = peftc.compile(model, vera.VeraConfig(target_modules=["q_proj", "down_proj"]))
    assert [name for name, _ in compiled.base.named_parameters() if "vera_A" in name] == ["vera_A.default"]
    assert compiled.base.vera_A["default"].shape == (8, 48)


def test_what_sites_share_is_there_once_and_comes_back_from_its_seed(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    spec = peftc.VeraConfig(r=8, save_projection=False, target_modules=["q_proj", "down_proj"])
    compiled = moved(peftc.compile(model, spec))
    names = [name for name, _ in compiled.base.named_parameters() if "vera_A" in name]
    assert names == ["vera_A.default"]
    assert compiled.base.vera_A["default"].shape == (8, 48)
    shared = sum(p.numel() for n, p in compiled.base.named_parameters() if n.startswith("vera_"))
    own = sum(p.numel() for n, p in compiled.base.named_parameters() if ".vera_" in n)
    assert compiled.plan.costs.total - peftc.plan(model, peftc.LoraConfig(r=1)).costs.total < shared + own
    compiled.save_pretrained(tmp_path)
    assert not any("vera_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(peftc.load(model, tmp_path)(ids).logits, compiled(ids).logits)
    compiled.add_adapter("b", spec)
    compiled.delete_adapter("default")
    assert [name for name, _ in compiled.base.named_parameters() if "vera_A" in name] == ["vera_A.b"]
    assert not [name for name, _ in compiled.unload().named_parameters() if "vera" in name]


def test_a_model_that_runs_its_children_holds_what_is_shared_at_the_first_site(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.randn(3, 8)
    compiled = moved(peftc.compile(model, peftc.VeraConfig(r=8, save_projection=False, target_modules=["0", "1"])))
    assert [name for name, _ in compiled.base.named_parameters() if "vera_A" in name] == ["0.vera_A.default"]
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(model, tmp_path)(x), compiled(x))
    compiled.delete_adapter("default")
    assert torch.equal(compiled(x), model(x))
    assert not [name for name, _ in compiled.base.named_parameters() if "vera" in name]


def test_norms_of_a_real_model_are_trained_alone(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    compiled = peftc.compile(model, peftc.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    assert {edit.slots for edit in compiled.plan.edits} == {("weight",)}
    assert torch.equal(compiled(ids).logits, model(ids).logits)
    compiled(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in compiled.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    y = moved(compiled)(ids).logits
    with compiled.merged():
        torch.testing.assert_close(compiled(ids).logits, y)
    compiled.save_pretrained(tmp_path)
    assert torch.equal(peftc.load(model, tmp_path)(ids).logits, y)


def test_a_weight_only_rule_after_lora_on_one_site() -> None:
    """What comes before is taken in the weight, so nothing vanishes; what comes after goes around it."""
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8, dtype=torch.float64)
    lora = peftc.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    for order in (["lora", "oft", "scale"], ["oft", "lora", "scale"], ["scale", "lora", "oft"]):
        made = {
            "lora": lora,
            "oft": peftc.OFTConfig(oft_block_size=2, target_modules=["0"]),
            "scale": peftc.IA3Config(target_modules=["0"], feedforward_modules=[]),
        }
        compiled = peftc.compile(model, {name: made[name] for name in order})
        compiled.set_adapter(order)
        y = moved(compiled)(x)
        for name in order:
            compiled.set_adapter([other for other in order if other != name])
            assert not torch.allclose(compiled(x), y)
        compiled.set_adapter(order)
        compiled.merge_adapter()
        torch.testing.assert_close(compiled(x), y)


def test_a_fold_of_whole_rows_is_the_same_in_tiles_of_a_transposed_weight() -> None:
    """More elements than a tile has, stored turned: a norm of rows must not see a piece of each."""
    from transformers.pytorch_utils import Conv1D

    class Turned(Rule[dora.DoraConfig]):
        name, spec, ops, local = "turned", dora.DoraConfig, ("linear",), "o"

        def params(self, spec: Any, site: Any) -> dict[str, peftc.Param]:
            return {"gain": peftc.Param((site.out_features, 1), "normal", axes="o.")}

        def weight(self, weight: Tensor, p: Any) -> Tensor:
            return p.gain * weight / weight.norm(dim=1, keepdim=True)

    peftc.unregister(METHODS["dora"])
    rule = Turned()
    peftc.register(rule)
    try:
        model = nn.Sequential(Conv1D(700, 600)).double()
        compiled = peftc.compile(model, dora.DoraConfig(target_modules=["0"]))
        gain = compiled.base[0].gain["default"].detach()
        exact = (gain * model[0].weight.T / model[0].weight.T.norm(dim=1, keepdim=True)).T
        compiled.merge_adapter()
        torch.testing.assert_close(compiled.base[0].weight, exact.detach())
        compiled.unmerge_adapter()
        assert torch.equal(compiled.base[0].weight, model[0].weight)
    finally:
        peftc.unregister(rule)
        peftc.register(METHODS["dora"])
