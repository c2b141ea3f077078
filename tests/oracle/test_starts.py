"""LoRA's starts from data and from the weight's least directions, against peft on the same data."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import loftq_utils
from torch import Tensor, nn

import peftc
from tests.support.against import near
from tests.support.interchange import perturbed, quietly, write
from tests.support.models import Everything, QuantisedLinear, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot

TARGETS = {"llama": ["q_proj", "k_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def batches(count: int, rows: int = 8, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Token ids, with padding, and labels that leave some out."""
    made: list[dict[str, Tensor]] = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        ids = torch.randint(0, 64, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[-1, :4] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def factors(model: Any, name: str = "default") -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and s of every site of a peft model, by the site's name in the base."""
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {
        fqn.removeprefix("base_model.model."): (m.lora_A[name].weight, m.lora_B[name].weight, m.scaling[name])
        for fqn, m in layers.items()
    }


def held_against(ours: peftc.CompiledModel, theirs: Any, tolerance: float) -> None:
    """The same sites, ranks, scalings, and A and B."""
    own = {edit.site: edit for edit in ours.plan.edits}
    expected = factors(theirs)
    assert own.keys() == expected.keys()
    for fqn, (a, b, scaling) in expected.items():
        assert own[fqn].constants["scaling"] == pytest.approx(scaling), fqn
        module = ours.base.get_submodule(fqn)
        near(module.lora_A.default.weight, a, tolerance, f"A of {fqn}")
        near(module.lora_B.default.weight, b, tolerance, f"B of {fqn}")


def eva(config: Any, data: list[Any], family: str = "llama", rank: int | None = None) -> tuple[nn.Module, Any]:
    """A model, whose token embeddings are of that rank, and peft's."""
    torch.manual_seed(0)
    net = tiny(family).eval()
    if rank is not None:
        net.model.embed_tokens.weight.data = torch.randn(64, rank) @ torch.randn(rank, 32)
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), config)
    quietly(peft.initialize_lora_eva_weights, theirs, data, show_progress_bar=False)
    return net, theirs.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "told", [{}, {"rho": 1.0}, {"rho": 1.5, "adjust_scaling_factors": False}, {"use_label_mask": False, "tau": 0.9}]
)
def test_eva_gives_the_ranks_scalings_and_directions_of_peft(family: str, told: dict[str, Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": "eva"}
    data = batches(4)
    net, theirs = eva(peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**told)), data, family)
    ours = peftc.compile(net, peftc.LoraConfig(**fields, eva_config=told), calibration=data).eval()
    held_against(ours, theirs, 1e-4)
    ids = token_ids(2, 7, 64)
    assert torch.equal(ours(ids).logits, net(ids).logits)
    if told == {} and family == "llama":
        ranks = {edit.constants["r"] for edit in ours.plan.edits}
        assert len(ranks) > 1, "no rank moved"
        _files_both_ways(net, ours, theirs, tmp_path)


def _files_both_ways(net: nn.Module, ours: peftc.CompiledModel, theirs: Any, folder: Path, converted: str = "") -> None:
    ids = token_ids(2, 7, 64)
    perturbed(ours, 1)
    perturbed(theirs, 2)
    ours.save_pretrained(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(folder / "ours")).eval()
    near(again(ids).logits, ours(ids).logits, 1e-5, "outputs of peft, from files of peftc")
    back = peftc.load(net, folder / "theirs")
    near(back(ids).logits, theirs(ids).logits, 1e-5, "outputs of peftc, from files of peft")
    own = peftc.load(net, folder / "ours")
    assert torch.equal(own(ids).logits, ours(ids).logits)


def test_eva_leaves_out_sites_that_get_no_rank(tmp_path: Path) -> None:
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    fields: dict[str, Any] = {"r": 1, "target_modules": targets, "init_lora_weights": "eva"}
    told, data = {"rho": 4.0}, batches(4)
    net, theirs = eva(peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**told)), data, rank=8)
    ours = peftc.compile(net, peftc.LoraConfig(**fields, eva_config=told), calibration=data).eval()
    assert len(ours.plan.edits) < 3 * 4, "all sites are left"
    held_against(ours, theirs, 1e-4)
    _files_both_ways(net, ours, theirs, tmp_path)


def test_eva_whitens_as_peft_does_where_no_input_is_read_twice() -> None:
    """Where one is, peft divides what its sites share once for each of them."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["k_proj", "o_proj", "down_proj"], "init_lora_weights": "eva"}
    told, data = {"whiten": True}, batches(4)
    net, theirs = eva(peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**told)), data)
    ours = peftc.compile(net, peftc.LoraConfig(**fields, eva_config=told), calibration=data).eval()
    held_against(ours, theirs, 1e-4)


def test_eva_goes_by_patterns_and_excluded_names() -> None:
    fields: dict[str, Any] = {
        "r": 2,
        "target_modules": TARGETS["llama"],
        "init_lora_weights": "eva",
        "exclude_modules": ["layers.1.self_attn.q_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"layers.0.*": 3},
        "use_rslora": True,
    }
    told, data = {"rho": 3.0}, batches(4)
    net, theirs = eva(peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**told)), data)
    ours = peftc.compile(net, peftc.LoraConfig(**fields, eva_config=told), calibration=data).eval()
    held_against(ours, theirs, 1e-4)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_starts_as_in_peft(family: str, method: str) -> None:
    torch.manual_seed(0)
    net, data = tiny(family).eval(), batches(20, rows=1)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": "corda"}
    config = peft.LoraConfig(**fields, corda_config=CordaConfig(corda_method=method))
    model = copy.deepcopy(net)
    quietly(preprocess_corda, model, config, run_model=lambda: [model(**batch) for batch in data])
    theirs = quietly(peft.get_peft_model, model, config).eval()
    ours = peftc.compile(
        net, peftc.LoraConfig(**fields, corda_config={"corda_method": method}), calibration=data
    ).eval()
    _held_by_products(ours, theirs, 1e-3)
    _trains_as(net, ours, theirs)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_starts_as_in_peft(direction: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # What is drawn in a start is each library's own.
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).roll(3))
    monkeypatch.setattr(torch, "svd_lowrank", _exactly)
    net, data = tiny("llama").eval(), batches(3)
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS["llama"], "init_lora_weights": "lora_ga"}
    told: dict[str, Any] = {"direction": direction, "scale": scale, "stable_gamma": 9}
    config = peft.LoraConfig(**fields, lora_ga_config=peft.LoraGAConfig(**told))
    model = copy.deepcopy(net)
    quietly(peft.preprocess_loraga, model, config, lambda: [model(**batch).loss.backward() for batch in data])
    theirs = quietly(peft.get_peft_model, model, config).eval()
    found = peftc.calibrate(net, peftc.LoraConfig(**fields, lora_ga_config=told), data)
    ours = peftc.compile(net, found.spec, calibration=found).eval()
    for fqn, (a, b, _) in factors(theirs).items():
        module = ours.base.get_submodule(fqn)
        near(module.lora_A.default.weight.abs(), a.abs(), 1e-3, f"A of {fqn}, but for signs")
        near(module.lora_B.default.weight.abs(), b.abs(), 1e-3, f"B of {fqn}, but for signs")
    _trains_as(net, ours, theirs)


def test_lora_ga_on_transposed_weights_is_that_of_the_weights_as_they_are_used() -> None:
    """peft turns the gradient, but not what it knows of the weight's shape, and fails there."""
    net = tiny("gpt2").eval()
    spec = peftc.LoraConfig(r=2, target_modules=TARGETS["gpt2"], init_lora_weights="lora_ga")
    ours = peftc.compile(net, spec, calibration=batches(2)).eval()
    ids = token_ids(2, 7, 64)
    near(ours(ids).logits, net(ids).logits, 1e-6, "outputs")


def _exactly(x: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].mT


def _held_by_products(ours: peftc.CompiledModel, theirs: Any, tolerance: float) -> None:
    """Singular vectors may have either sign: what is the same is B·A, and AᵀA."""
    for fqn, (a, b, _scaling) in factors(theirs).items():
        module = ours.base.get_submodule(fqn)
        own_a, own_b = module.lora_A.default.weight, module.lora_B.default.weight
        near(own_b @ own_a, b @ a, tolerance, f"B·A of {fqn}")
        near(own_a.mT @ own_a, a.mT @ a, tolerance, f"AᵀA of {fqn}")


def _trains_as(net: nn.Module, ours: peftc.CompiledModel, theirs: Any) -> None:
    """Fresh, it is the base; and moved by the same, the same: peft has a residual weight, peftc takes the start off."""
    ids = token_ids(2, 7, 64)
    near(ours(ids).logits, net(ids).logits, 1e-5, "outputs of a fresh one")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for fqn, (a, b, _) in factors(theirs).items():
            module = ours.base.get_submodule(fqn)
            for own, other in ((module.lora_A.default.weight, a), (module.lora_B.default.weight, b)):
                other.copy_(own + 0.1 * torch.randn(own.shape, generator=generator))
                own.copy_(other)
    near(ours(ids).logits, theirs(ids).logits, 1e-3, "outputs")
    y = ours(ids).logits
    with ours.merged():
        near(ours(ids).logits, y, 1e-4, "outputs after merging")


def test_mica_starts_as_in_peft_and_keeps_b(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = tiny("llama").eval()
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS["llama"], "init_lora_weights": "mica"}
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), peft.LoraConfig(**fields)).eval()
    ours = peftc.compile(net, peftc.LoraConfig(**fields)).eval()
    for fqn, (a, b, _) in factors(theirs).items():
        module = ours.base.get_submodule(fqn)
        own = module.lora_B.default.weight
        near(own @ own.mT, b @ b.mT, 1e-4, f"B·Bᵀ of {fqn}")
        assert not a.any()
        assert not module.lora_A.default.weight.any()
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_A" in name for name in trained)
    _files_both_ways(net, ours, theirs, tmp_path)


FIELDS: dict[str, dict[str, Any]] = {
    name: {"r": 4, "target_modules": TARGETS["llama"], "init_lora_weights": name}
    for name in ("eva", "corda", "lora_ga")
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_from_data_is_saved_served_and_resumed(name: str, dora: bool, tmp_path: Path) -> None:
    net, ids = tiny("llama").eval(), token_ids(2, 7, 64)
    spec = peftc.LoraConfig(**FIELDS[name], use_dora=dora)
    ours = perturbed(peftc.compile(net, spec, calibration=batches(4)), 1)
    y = ours(ids).logits
    assert not torch.allclose(y, net(ids).logits, atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    again = peftc.load(net, tmp_path / "ours", is_trainable=True).eval()
    assert torch.equal(again(ids).logits, y)
    ours.load_adapter(tmp_path / "ours", "default")
    assert torch.equal(ours(ids).logits, y)
    if not dora:
        ours.save_pretrained(tmp_path / "served", form="serving")
        served = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "served")).eval()
        near(served(ids).logits, y, 1e-5, "outputs of peft, from the serving form")


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_a_file_that_lacks_what_it_started_from_is_refused_and_loads_on_the_residual_base(
    name: str, tmp_path: Path
) -> None:
    net, data = tiny("llama").eval(), batches(4, rows=1)
    ours = perturbed(peftc.compile(net, peftc.LoraConfig(**FIELDS[name]), calibration=data), 1)
    state = peftc.get_peft_model_state_dict(ours)
    file = {key: value for key, value in state.items() if not key.endswith("0")}
    config = ours.plan.adapters["default"].to_dict()
    write(tmp_path, config, file)
    with pytest.raises(peftc.AdapterError, match="write init_lora_weights=true into the file's config"):
        peftc.load(net, tmp_path)
    # As it says: on the base that peft leaves.
    residual = copy.deepcopy(net)
    for edit in ours.plan.edits:
        module, p = residual.get_submodule(edit.site), ours.base.get_submodule(edit.site)
        module.weight.data -= edit.constants["scaling"] * (p.lora_B0["default"] @ p.lora_A0["default"]).detach()
    write(tmp_path, {**config, "init_lora_weights": True}, file)
    ids = token_ids(2, 7, 64)
    near(peftc.load(residual, tmp_path)(ids).logits, ours(ids).logits, 1e-5, "outputs on the residual base")


def test_eva_needs_no_weight_and_leaves_other_ops_to_start_as_ever() -> None:
    torch.manual_seed(0)
    net = Everything().eval()
    net.linear = QuantisedLinear(net.linear)
    spec = peftc.LoraConfig(r=2, target_modules=["linear", "conv2d", "embed"], init_lora_weights="eva")
    data = [token_ids(6) for _ in range(3)]
    ours = peftc.compile(net, spec, calibration=data)
    assert torch.equal(ours(data[0]), net(data[0]))
    assert len(ours.plan.edits) == 3


def test_wrong_calls_are_told_what_to_do() -> None:
    net, data = tiny("llama").eval(), batches(2)
    with pytest.raises(peftc.AdapterError, match=r"no 48 directions \(r·rho\); lower r, or rho in eva_config"):
        peftc.compile(net, peftc.LoraConfig(**{**FIELDS["eva"], "r": 24}), calibration=data)
    told = {"rho": 1.0}
    peftc.compile(net, peftc.LoraConfig(**{**FIELDS["eva"], "r": 24}, eva_config=told), calibration=data)
    with pytest.raises(peftc.AdapterError, match="none had rows enough"):
        peftc.compile(net, peftc.LoraConfig(**FIELDS["eva"]), calibration=batches(3, rows=1, length=7))
    with pytest.raises(
        peftc.NoMatchError, match="lora_ga takes factors of the weight: 2 times r=17 is over its smaller"
    ):
        peftc.compile(net, peftc.LoraConfig(**{**FIELDS["lora_ga"], "r": 17}), calibration=data)
    for fields, said in (
        ({"eva_config": {"rho": 0.5}}, "rho: got 0.5; input should be greater than or equal to 1"),
        ({"eva_config": {"ro": 2.0}}, "eva_config.ro: no such field"),
        ({"corda_config": {"corda_method": "imp"}}, r"corda_method: got 'imp'.*nearest: 'ipm'"),
        ({"lora_ga_config": {"scale": "stabel"}}, r"scale: got 'stabel'.*nearest: 'stable'"),
        ({"lora_bias": True}, "lora_bias needs init_lora_weights=True or False"),
        ({"init_lora_weights": "loftq"}, r"needs loftq_config: give it"),
    ):
        with pytest.raises(peftc.SpecError, match=said):
            peftc.LoraConfig(**{**FIELDS["eva"], **fields})


def peft_loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft's own run without a GPU, which it asks for by name."""
    code = loftq_utils.loftq_init.__wrapped__.__code__
    constants = tuple("cpu" if value == "cuda" else value for value in code.co_consts)
    monkeypatch.setattr(loftq_utils.loftq_init.__wrapped__, "__code__", code.replace(co_consts=constants))


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 3), (8, 2)])
def test_loftq_is_that_of_peft(bits: int, iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="peft's LoftQ needs bitsandbytes; `make test-clients` has it, and runs this"
    )
    peft_loftq(monkeypatch)
    torch.manual_seed(0)
    # On the CPU, bitsandbytes gives rows back that are shorter than its blocks of 64 as something else.
    net, ids = tiny("llama", hidden_size=64, intermediate_size=128).eval(), token_ids(2, 7, 64)
    told = {"loftq_bits": bits, "loftq_iter": iterations}
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS["llama"], "init_lora_weights": "loftq"}
    config = peft.LoraConfig(**fields, loftq_config=peft.LoftQConfig(**told))
    theirs = quietly(peft.get_peft_model, copy.deepcopy(net), config).eval()
    before = snapshot(net)
    ours = peftc.compile(net, peftc.LoraConfig(**fields, loftq_config=told)).eval()
    assert_unchanged(net, before)
    _held_by_products(ours, theirs, 1e-4)
    assert not torch.allclose(ours(ids).logits, net(ids).logits, rtol=0, atol=1e-6)
    near(ours(ids).logits, theirs(ids).logits, 1e-5, "outputs of a fresh one")
    _files_both_ways(net, ours, theirs, tmp_path)
    assert not any("lora_D" in key for key in peftc.get_peft_model_state_dict(ours))
    y, state = ours(ids).logits, {name: value.clone() for name, value in ours.state_dict().items()}
    with ours.merged():
        near(ours(ids).logits, y, 1e-4, "outputs after merging")
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_loftq_is_merged_on_disk_and_undone_byte_for_byte(tmp_path: Path) -> None:
    net, ids = tiny("llama").eval(), token_ids(2, 7, 64)
    net.save_pretrained(tmp_path / "base")
    spec = peftc.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    ours = perturbed(peftc.compile(net, spec), 1)
    ours.save_pretrained(tmp_path / "adapter")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", undo=True)
    merged = type(net).from_pretrained(tmp_path / "merged").eval()
    near(merged(ids).logits, ours(ids).logits, 1e-5, "outputs of the merged checkpoint")
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    first, again = (tmp_path / folder / "model.safetensors" for folder in ("base", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_what_loftq_does_not_go_with_is_refused() -> None:
    fields: dict[str, Any] = {"r": 2, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(peftc.SpecError, match="use_dora and init_lora_weights='loftq' don't go together"):
        peftc.LoraConfig(**fields, target_modules=["linear"], use_dora=True)
    with pytest.raises(peftc.NoMatchError, match="init_lora_weights='loftq' is for linear sites, this is conv2d"):
        peftc.compile(Everything(), peftc.LoraConfig(**fields, target_modules=["conv2d"]))
    with pytest.raises(peftc.SpecError, match=r"loftq_bits.*got 5"):
        peftc.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 5})
