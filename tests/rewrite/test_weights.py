"""The weight slot: LoRA on expert parameters and nn.MultiheadAttention, against peft and by the laws."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.compare import assert_close, first_tensor, randomise, to_peft
from tests.support.models import Attending
from tests.support.snapshots import assert_unchanged, snapshot

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_SMALL, intermediate_size=40, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt_oss() -> nn.Module:
    more = {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = transformers.GptOssConfig(**_SMALL, **more, layer_types=["full_attention"] * 2)
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # Some start without values.
    return model


def llama4() -> nn.Module:
    more = {"intermediate_size": 40, "intermediate_size_mlp": 40, "num_local_experts": 4, "head_dim": 8}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**_SMALL, **more))


def qwen3_moe() -> nn.Module:
    more = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_SMALL, **more, head_dim=8))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral, one": (mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "gpt_oss": (gpt_oss, {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "llama4": (llama4, {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "qwen3_moe": (qwen3_moe, {"target_modules": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "attention": (Attending, {"target_modules": ["attn", "head"]}),
    "attention without bias": (lambda: Attending(bias=False, add_bias_kv=True), {"target_modules": ["attn"]}),
}
ONLY_HERE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention of other widths": (lambda: Attending(kdim=8, vdim=12), {"target_modules": ["attn"]}),
}


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Attending):
        return {"x": torch.randn(2, 5, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 60, (2, 6), generator=generator)}


def made(case: str, **fields: Any) -> tuple[nn.Module, peftc.CompiledModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    build, targets = {**MODELS, **ONLY_HERE}[case]
    model = build().eval()
    compiled = peftc.compile(model, peftc.LoraConfig(r=2, lora_alpha=5, **targets), **fields)
    randomise(compiled)
    return model, compiled, inputs(model)


@pytest.mark.parametrize("case", MODELS)
def test_outputs_gradients_and_files_equal_peft(case: str, tmp_path: Path) -> None:
    model, compiled, x = made(case)
    theirs = to_peft(compiled, model, tmp_path)
    ours, expected = first_tensor(compiled(**x)), first_tensor(theirs(**x))
    assert not torch.allclose(ours, first_tensor(model(**x)), atol=1e-3)
    assert_close(ours, expected, tolerance=2e-6)
    ours.square().sum().backward()
    expected.square().sum().backward()
    live = dict(theirs.named_parameters())
    for key, tensor in compiled.adapter_state_dict().items():
        if "out_proj" in key:
            continue  # peft adds its delta twice, but lets the gradient through once.
        gradient = live[key.replace(".weight", ".default.weight")].grad
        assert_close(tensor.grad, gradient, key, 2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftc.load(model, tmp_path / "theirs")
    assert_close(first_tensor(again(**x)), ours, tolerance=1e-6 if "attention" in case else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["keep", "residual"])
@pytest.mark.parametrize("case", [*MODELS, *ONLY_HERE])
def test_merging_and_back(case: str, mode: Any, dtype: torch.dtype) -> None:
    build, targets = {**MODELS, **ONLY_HERE}[case]
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    compiled = peftc.compile(model, peftc.LoraConfig(r=2, lora_alpha=5, **targets), inplace=True)
    randomise(compiled)
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(model).items()}
    before, y = snapshot(compiled), first_tensor(compiled(**x))
    for _ in range(3):
        compiled.merge_adapter(undo=mode)
        assert compiled.site_code() == {}
        merged = first_tensor(compiled(**x))
        compiled.unmerge_adapter()
    assert_unchanged(compiled, before)
    assert torch.equal(first_tensor(compiled(**x)), y)
    if dtype is torch.float32:  # In bfloat16, rounding sends tokens to other experts.
        torch.testing.assert_close(merged, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_merged_experts_are_correctly_rounded() -> None:
    for case in ("mixtral", "gpt_oss"):
        model, compiled, _ = made(case)
        state = compiled.adapter_state_dict()
        a, b = (state[f"base_model.model.model.layers.0.mlp.experts.lora_{n}.weight"].double() for n in "AB")
        weight = model.get_parameter("model.layers.0.mlp.experts.down_proj").detach().double()
        experts = weight.shape[0]
        r = a.shape[0] // experts
        delta = torch.stack([b[:, e::experts] @ a[e * r : (e + 1) * r] for e in range(experts)]) * 2.5
        exact = weight + (delta if delta.shape == weight.shape else delta.mT)
        compiled.merge_adapter()
        merged = compiled.base.get_parameter("model.layers.0.mlp.experts.down_proj")
        assert torch.equal(merged.double(), exact.float().double())


def test_the_algebra_of_an_attention_is_plain() -> None:
    """W + s·B·A for both weights. peft adds that of out_proj twice: its files hold half of what is in effect."""
    model, compiled, x = made("attention")
    state = {key.removeprefix("base_model.model."): t.detach() for key, t in compiled.adapter_state_dict().items()}
    plain = copy.deepcopy(model)
    places = {"attn.in_proj_weight": "attn", "attn.out_proj.weight": "attn.base_layer.out_proj", "head.weight": "head"}
    with torch.no_grad():
        for weight, site in places.items():
            delta = state[f"{site}.lora_B.weight"] @ state[f"{site}.lora_A.weight"]
            plain.get_parameter(weight).add_(2.5 * delta)
    torch.testing.assert_close(compiled(**x), plain(**x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", [*MODELS, *ONLY_HERE])
def test_laws(case: str, tmp_path: Path) -> None:
    """Original untouched, identity at the start, copies, files, deletion, plan round trip, the base back."""
    torch.manual_seed(0)
    build, targets = {**MODELS, **ONLY_HERE}[case]
    model, spec = build().eval(), peftc.LoraConfig(r=2, **targets)
    x, before = inputs(model), snapshot(model)
    # torch's attention has a path of its own for weights that want no gradients, with other rounding.
    near = 1e-6 if isinstance(model, Attending) else 0.0

    def assert_same(y: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(y, expected, rtol=0, atol=near)

    compiled = peftc.compile(model, spec)
    bare = first_tensor(model(**x))
    assert_same(first_tensor(compiled(**x)), bare)
    randomise(compiled)
    y = first_tensor(compiled(**x))
    with compiled.disable_adapter():
        assert_same(first_tensor(compiled(**x)), bare)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_same(first_tensor(other(**x)), y)
    compiled.save_pretrained(tmp_path)
    assert_same(first_tensor(peftc.load(model, tmp_path)(**x)), y)
    plan = peftc.Plan.from_json(compiled.plan.to_json())
    assert plan == compiled.plan == peftc.plan(model, spec)
    compiled.add_adapter("b", peftc.LoraConfig(r=3, **targets))
    compiled.set_adapter(["default", "b"])
    perturb(compiled)
    assert not torch.equal(first_tensor(compiled(**x)), y)
    compiled.delete_adapter("default")
    compiled.set_adapter([])
    assert_same(first_tensor(compiled(**x)), bare)
    base = compiled.unload()
    assert_unchanged(base, before, identity=False)
    assert_unchanged(model, before)


def test_two_adapters_on_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model, x = Attending().double().eval(), {"x": inputs(Attending())["x"].double()}
    specs = {n: peftc.LoraConfig(r=2, lora_alpha=a, target_modules=["attn"]) for n, a in (("a", 3), ("b", -4))}
    compiled = perturb(peftc.compile(model, specs))
    compiled.set_adapter(["a", "b"])
    y = compiled(**x)
    compiled.merge_adapter("b")
    torch.testing.assert_close(compiled(**x), y)
    compiled.unmerge_adapter()
    compiled.merge_adapter()
    torch.testing.assert_close(compiled(**x), y)


def test_an_encoder_layer_of_torch() -> None:
    """Its fused inference path, which reads the weights, is turned off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=2, target_modules=["self_attn", "linear1"])))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = compiled(x)
        assert not torch.allclose(y, model(x), atol=1e-3)
        merged = compiled.merge_and_unload()
        torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)


def test_experts_train_under_gradient_checkpointing() -> None:
    _, compiled, x = made("mixtral")
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            compiled.train()
            compiled.gradient_checkpointing_enable()
        compiled(**x, labels=x["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in compiled.named_parameters() if p.grad is not None})
        compiled.zero_grad(set_to_none=True)
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_patterns_match_the_parameter_or_the_attention() -> None:
    spec = peftc.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=EXPERTS,
        rank_pattern={"down_proj": 5},
        alpha_pattern={r"0\..*up_proj": 9},
    )
    edits = {edit.site: edit for edit in peftc.plan(mixtral(), spec).edits}
    assert edits["model.layers.1.mlp.experts.down_proj"].params[0].shape == (15, 40)
    assert edits["model.layers.0.mlp.experts.gate_up_proj"].constants["lora_alpha"] == 9
    assert edits["model.layers.1.mlp.experts.gate_up_proj"].constants["lora_alpha"] == 8
    attention = peftc.plan(Attending(), peftc.LoraConfig(r=2, target_modules=["attn"], rank_pattern={"attn": 3}))
    assert {edit.site: edit.constants["r"] for edit in attention.edits} == {
        "attn.in_proj_weight": 3,
        "attn.out_proj.weight": 3,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, "matches no parameter. Nearest: 'gate_up_proj'"),
        ({"target_parameters": ["norm.weight"]}, "a matrix is expected"),
        ({"target_parameters": ["embed_tokens.weight"]}, "is the weight of embedding 'model.embed_tokens'"),
        ({"target_parameters": EXPERTS, "lora_dropout": 0.1}, "lora_dropout=0.1 drops inputs"),
        ({"target_parameters": EXPERTS, "lora_bias": True}, "a parameter has no bias"),
        ({"target_parameters": EXPERTS, "init_lora_weights": "pissa"}, "is for linear sites"),
    ],
    ids=["unknown", "vector", "embedding", "dropout", "bias", "start"],
)
def test_what_cannot_be_adapted_is_refused(fields: dict[str, Any], message: str) -> None:
    model = mixtral()
    before = snapshot(model)
    with pytest.raises(peftc.NoMatchError) as caught:
        peftc.compile(model, peftc.LoraConfig(target_modules=[], **fields))
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_other_captures_methods_and_mixed_batches_are_refused() -> None:
    with pytest.raises(peftc.CaptureError, match=r"never uses it in the graph.*capture='modules'"):
        peftc.compile(Attending(), peftc.LoraConfig(target_modules=["attn"]), capture="symbolic")
    with pytest.raises(peftc.NoMatchError, match="is attention; IA3 adapts linear"):
        peftc.compile(Attending(), peftc.IA3Config(target_modules=["attn"], feedforward_modules=[]))
    compiled = peftc.compile(Attending(), peftc.LoraConfig(target_modules=["attn"]))
    with pytest.raises(peftc.AdapterError, match="adapted as a weight, which all rows share"):
        compiled(torch.randn(2, 5, 16), adapter_names=["default", "__base__"])


def test_defaults_are_not_needed_beside_parameters() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->beo", x, self.w)

    compiled = perturb(peftc.compile(Experts(), peftc.LoraConfig(r=1, target_parameters=["w"])))
    x = torch.randn(2, 4)
    y = compiled(x)
    with compiled.merged():
        torch.testing.assert_close(compiled(x), y)
