"""Methods against peft in their variants: outputs, gradients, files both ways, merging, half precision, the same draws."""

import copy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from tests.support.against import config_of, half_as_peft, same_as_peft
from tests.support.interchange import quietly
from tests.support.methods import LINEARS, ROWS, Linears
from tests.support.models import tiny, token_ids

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "BeftConfig": {"plain": {}, "random": {"init_weights": False}},
    "DeftConfig": {
        "plain": {"r": 3},
        "orthogonal": {"r": 3, "decomposition_method": "qr"},
        "removal alone": {"r": 3, "para": True},
        "scaled": {"r": 3, "alpha": 6, "deft_dropout": 0.1},
        "random": {"r": 3, "init_weights": False, "init_scale": 2.0, "bias": "deft_only"},
        "of more than there are outputs": {"r": 9},
    },
    "GloraConfig": {
        "products": {"r": 3},
        "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constants": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        "of the bias": {"r": 3, "config_A_B": "none", "config_D_E": "vector"},
    },
    "UniLoraConfig": {
        "plain": {"theta_d_length": 50},
        "saved": {"theta_d_length": 50, "save_indices": True, "bias": "unilora_only"},
        "another seed": {"theta_d_length": 50, "proj_seed": 3, "unilora_dropout": 0.1},
    },
    "TinyLoraConfig": {
        "plain": {"u": 5},
        "one for all": {"u": 5, "weight_tying": 1.0},
        "groups": {"u": 5, "weight_tying": 0.4, "save_projection": False},
        "random": {"u": 5, "r": 4, "init_weights": "uniform", "tinylora_dropout": 0.1},
    },
    "PsoftConfig": {
        "plain": {"r": 3},
        "series": {"r": 3, "use_cayley_neumann": True},
        "bounded": {"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
        "free": {"r": 3, "psoft_orth": False, "psoft_mag_a": False, "ab_svd_init": "pissa_init", "psoft_alpha": 6},
        "low rank": {"r": 3, "psoft_svd": "lowrank", "psoft_mag_b": False, "psoft_dropout": 0.1},
    },
    "PveraConfig": {
        "plain": {"r": 4},
        "not saved": {"r": 4, "save_projection": False, "init_weights": False, "bias": "pvera_only"},
    },
    "SupertuningConfig": {
        "plain": {"sparsity": 0.5},
        "with a LoRA": {"sparsity": 0.8, "r": 3, "select_top": False},
        "with dropout": {
            "sparsity": 0.5,
            "r": 2,
            "lora_alpha": 6,
            "lora_dropout": 0.1,
            "save_precomputed_indices": False,
        },
    },
    "WaveFTConfig": {
        **{
            name: {"n_frequency": 20, "wavelet_family": name}
            for name in ("db1", "db2", "db3", "db4", "db7", "db10", "sym2", "sym5", "sym8", "coif1", "coif3")
        },
        "not transformed": {"n_frequency": 9, "use_idwt": False, "bias": "waveft_only"},
        "patterns": {"n_frequency": 9, "n_frequency_pattern": {"c": 30}},
    },
    "PeanutConfig": {
        "shallow": {"r": 4, "init_weights": False},
        "deep": {"r": 4, "depth": 2, "act_fn": "tanh", "init_weights": False, "scaling": 0.5},
    },
    "FrodConfig": {
        "plain": {},
        "not saved": {"save_projection": False, "sparse_rate": 0.3, "projection_prng_key": 3, "bias": "frod_only"},
        "random": {"init_weights": False, "frod_dropout": 0.1, "regularization_alpha": 0.1},
    },
    "AdamssConfig": {
        "plain": {},
        "of a higher rank": {"num_subspaces": 2, "subspace_rank": 2},
        "of ranks by singular values": {
            "init_weights": None,
            "subspace_rank": 2,
            "use_dynamic_rank": True,
            "num_subspaces": 3,
            "r": 4,
        },
    },
    "OSFConfig": {
        "half": {},
        "a number": {"effective_rank": 3},
        "a share, and others": {"effective_rank": 0.25, "rank_pattern": {"n": 2}},
    },
}
# Where peft has linears only, or (BEFT) can't merge without a bias.
TARGETS: dict[str, list[str]] = {
    "BeftConfig": ["l"],
    **{
        name: ["l", "n"]
        for name in ("GloraConfig", "PsoftConfig", "SupertuningConfig", "PeanutConfig", "OSFConfig", "AdamssConfig")
    },
}
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def config(name: str, variant: str) -> Any:
    return config_of(name, {"target_modules": TARGETS.get(name, LINEARS), **VARIANTS[name][variant]})


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_outputs_gradients_files_and_merging(name: str, variant: str, tmp_path: Path) -> None:
    same_as_peft(Linears(), config(name, variant), ROWS, tmp_path)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
def test_in_bfloat16(name: str, variant: str, tmp_path: Path) -> None:
    # In half precision peft loses the hooks that keep OSF's gradients out of the directions that stay.
    without = ("U_low", "V_low") if name == "OSFConfig" else ()
    half_as_peft(Linears(), config(name, variant), ROWS, tmp_path, without=without)


@pytest.mark.parametrize("name", ["UniLoraConfig", "TinyLoraConfig", "PveraConfig", "WaveFTConfig"])
def test_what_is_drawn_is_what_peft_draws(name: str, tmp_path: Path) -> None:
    """So a file without it means the same in both: peft's says nothing of it, and a fresh one here has the same."""
    net, fields = (
        Linears(),
        {"UniLoraConfig": {"theta_d_length": 50, "save_indices": True}, "WaveFTConfig": {"n_frequency": 20}},
    )
    given = {"target_modules": LINEARS, **fields.get(name, {})}
    theirs: Any = quietly(peft.get_peft_model, copy.deepcopy(net), config_of(name, given))
    ours = peftc.compile(net, getattr(peftc, name)(**given))
    if name == "WaveFTConfig":
        own = dict(ours.base.named_parameters())
        assert all(
            torch.equal(
                own[f"{n}.waveft_indices.default"],
                theirs.base_model.get_submodule(f"model.{n}").waveft_indices["default"],
            )
            for n in LINEARS
        )
        return
    quietly(theirs.save_pretrained, tmp_path)
    saved, own = load_file(tmp_path / "adapter_model.safetensors"), ours.adapter_state_dict()
    drawn = [
        key for key in saved if any(part in key for part in ("indices", "scales", "tinylora_P", "pvera_A", "pvera_B"))
    ]
    assert drawn
    for key in drawn:
        assert torch.equal(own[key].to(saved[key].dtype), saved[key]), key


def test_gradients_of_osf_stay_out_of_the_directions_that_stay_in_half_precision_too() -> None:
    net = nn.Sequential(nn.Linear(8, 6)).bfloat16()
    ours = peftc.compile(net, peftc.OSFConfig(target_modules=["0"]))
    ours(torch.randn(5, 8).bfloat16()).float().square().sum().backward()
    own = dict(ours.base.named_parameters())
    gradient, kept = own["0.osf_svd_params.default.V_low"].grad, own["0._osf_V_high.default"]
    assert gradient is not None
    assert float((gradient @ kept.mT).abs().max()) < 1e-3 * float(gradient.abs().max())


def test_pvera_draws_while_training_alone() -> None:
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(4000, 8)
    ours = peftc.compile(net, peftc.PveraConfig(r=4, target_modules=["0"], init_weights=False)).eval()
    mean = ours(x)
    assert torch.equal(ours(x), mean)
    ours.train()
    assert not torch.allclose(ours(x), ours(x))
    # Unbiased: the mean over many draws is the mean.
    drawn = torch.stack([ours(x[:8]) for _ in range(4000)])
    spread = drawn.std(0) / 4000**0.5
    assert bool(((drawn.mean(0) - mean[:8]).abs() < 5 * spread + 1e-6).all())
    always = peftc.compile(
        net, peftc.PveraConfig(r=4, target_modules=["0"], init_weights=False, sample_at_inference=True)
    )
    always.eval()
    assert not torch.allclose(always(x), always(x))
    assert "sample_at_inference" in str(always.plan)


def test_without_pywavelets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(peftc.RuleError, match=r"pip install 'peftc\[wavelets\]'"):
        peftc.compile(Linears(), peftc.WaveFTConfig(n_frequency=9, wavelet_family="sym3", target_modules=LINEARS))


def test_wavelets_are_daubechies() -> None:
    from peftc_rules.wavelets import daubechies

    root = 3**0.5
    exact = [(1 + root), (3 + root), (3 - root), (1 - root)]
    torch.testing.assert_close(daubechies(2), [value / (4 * 2**0.5) for value in exact])
    for moments in range(1, 11):
        low = torch.tensor(daubechies(moments), dtype=torch.float64)
        for shift in range(moments):
            product = float((low[: len(low) - 2 * shift] * low[2 * shift :]).sum())
            assert abs(product - (shift == 0)) < 1e-6, "an orthogonal filter"


@pytest.mark.parametrize("name", ["TinyLoraConfig"])
def test_embeddings(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6))
    same_as_peft(net, config_of(name, {"target_modules": ["0", "1"]}), token_ids(), tmp_path)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "BeftConfig"])
def test_gpt2s_turned_weights_and_a_merge_on_disk(name: str, tmp_path: Path) -> None:
    model, ids = tiny("gpt2"), token_ids(2, 5, 64)
    fields = {**next(iter(VARIANTS[name].values())), "target_modules": ["c_attn", "mlp.c_proj"]}
    compiled = peftc.compile(model, getattr(peftc, name)(**fields))
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    y = compiled.eval()(ids).logits
    assert not torch.allclose(y, model(ids).logits, atol=1e-3)
    compiled.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, y, rtol=1e-3, atol=1e-4)


def test_a_merge_on_disk_of_a_file_of_peft_that_lacks_what_follows_from_the_base(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    model.save_pretrained(tmp_path / "base")
    theirs: Any = quietly(
        peft.get_peft_model, copy.deepcopy(model), config_of("PsoftConfig", {"r": 4, "init_weights": False})
    )
    theirs.save_pretrained(tmp_path / "theirs")
    where = (tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    peftc.merge_checkpoint(*where, undo=True, progress=False)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back", progress=False)
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: peftc.WaveFTConfig(wavelet_family="coif4"), "db1 to db10, sym2 to sym10 and coif1 to coif3"),
        (lambda: peftc.WaveFTConfig.from_dict({"proportional_parameters": True}), "proportional_parameters"),
        (lambda: peftc.SupertuningConfig(lora_alpha=4), "needs a rank"),
        (lambda: peftc.TinyLoraConfig(weight_tying=1.5), "weight_tying"),
        (lambda: peftc.PveraConfig.from_dict({"generator_seed": 1}), "generator_seed"),
        (lambda: peftc.PeanutConfig(act_fn="relu2"), "act_fn"),
    ],
)
def test_wrong_fields_are_refused(make: Any, said: str) -> None:
    with pytest.raises(peftc.SpecError, match=said):
        make()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (peftc.GloraConfig(config_A_B="none", config_C="none", config_D_E="none", target_modules=["0"]), "left out"),
        (peftc.SupertuningConfig(sparsity=0.999, target_modules=["0"]), "leaves nothing"),
        (peftc.PsoftConfig(r=7, target_modules=["0"]), "6 singular directions"),
        (peftc.OSFConfig(effective_rank=6, target_modules=["0"]), "smaller effective_rank"),
        (peftc.WaveFTConfig(n_frequency=49, target_modules=["0"]), "fewer than n_frequency=49"),
    ],
)
def test_what_does_not_fit_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(peftc.NoMatchError, match=said):
        peftc.compile(nn.Sequential(nn.Linear(8, 6)), spec)


def test_a_bias_that_is_not_there_is_not_merged() -> None:
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    ours = peftc.compile(net, peftc.BeftConfig(target_modules=["0"], init_weights=False))
    assert not torch.allclose(ours(torch.zeros(1, 8)), net(torch.zeros(1, 8)))
    with pytest.raises(peftc.MergeError, match="no bias that could be changed"):
        ours.merge_adapter()


def test_a_bias_that_follows_from_the_weight_sees_those_before_it() -> None:
    """Two adapters, merged at once and one after another."""
    net, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8).double()
    spec = peftc.GloraConfig(r=2, target_modules=["0"], init_weights=False)
    ours = peftc.compile(net, {"a": spec, "b": spec})
    ours.set_adapter(["a", "b"])
    y = ours(x)
    with ours.merged():
        torch.testing.assert_close(ours(x), y)
