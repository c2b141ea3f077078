"""What people do with a compiled model: train it, checkpoint gradients, torch.compile it, hand it to a Trainer, DDP."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as partitioner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import peftc
from tests.support.models import Everything, Net, inputs_for, tiny, token_ids


def compiled_llama(**fields: Any) -> peftc.CompiledModel:
    return peftc.compile(tiny("llama"), peftc.LoraConfig(target_modules="all-linear", r=4, **fields))


def train(model: nn.Module, steps: int = 8) -> list[float]:
    ids = token_ids(4, 8, 64)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_moves_the_adapter_only() -> None:
    compiled = compiled_llama()
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
    losses = train(compiled)
    assert losses[-1] < losses[0] - 0.3
    changed = {name for name, tensor in compiled.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    compiled = compiled_llama().train()
    ids = token_ids(2, 6, 64)
    compiled(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in compiled.named_parameters() if p.grad is not None}
    compiled.zero_grad()
    compiled.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled.enable_input_require_grads()
    compiled(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_autocast(capture: Any) -> None:
    model = Net().eval()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["conv", "fc"], r=4), capture=capture)
    ia3 = peftc.compile(model, peftc.IA3Config(target_modules=["conv", "fc"], feedforward_modules=["fc"]))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        for adapted in (compiled, ia3):
            assert adapted(x).dtype == expected.dtype == torch.bfloat16
            assert torch.equal(adapted(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora", "ia3", "saved"])
def test_torch_compile_fullgraph(spec: str) -> None:
    torch.compiler.reset()
    specs: dict[str, peftc.AdapterSpec] = {
        "lora": peftc.LoraConfig(
            target_modules=["embed", "linear", "transposed", "conv2d"], r=4, init_lora_weights=False
        ),
        "ia3": peftc.IA3Config(
            target_modules=["linear", "conv2d"], feedforward_modules=["linear"], init_ia3_weights=False
        ),
        "saved": peftc.LoraConfig(target_modules=["linear"], modules_to_save=["head"], init_lora_weights=False),
    }
    compiled = peftc.compile(Everything().eval(), specs[spec])
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    ids = token_ids()
    torch.testing.assert_close(fast(ids), compiled(ids))
    with compiled.disable_adapter():
        torch.testing.assert_close(fast(ids), compiled(ids))
    torch.testing.assert_close(fast(ids), compiled(ids))


@pytest.mark.slow
def test_torch_compile_on_a_language_model() -> None:
    torch.compiler.reset()
    compiled = compiled_llama(init_lora_weights=False)
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    ids = token_ids(2, 6, 64)
    torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, compiled(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["modules", "export"])
def test_a_compiler_recomputes_what_a_budget_says(capture: Any) -> None:
    torch.compiler.reset()
    ids = token_ids(2, 16, 64)
    spec = peftc.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    inputs = {"input_ids": ids, "labels": ids} if capture == "export" else None
    compiled = peftc.compile(tiny("llama").train(), spec, capture=capture, inputs=inputs)

    def step(model: Any) -> tuple[int, dict[str, Tensor]]:
        """Bytes that the forward pass keeps, without parameters, and the gradients."""
        own = {parameter.untyped_storage().data_ptr() for parameter in compiled.parameters()}
        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
        compiled.zero_grad()
        return sum(one.nbytes() for at, one in kept.items() if at not in own), gradients

    all_of_it, expected = step(compiled)
    with partitioner.patch(activation_memory_budget=0.2):
        less, gradients = step(torch.compile(compiled, backend="aot_eager_decomp_partition"))
    assert 0 < less < all_of_it / 2
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_the_trainer_trains_it(tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules="all-linear", r=4))
    ids = token_ids(16, 8, 64)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=compiled, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    compiled.save_pretrained(tmp_path / "adapter")
    again = peftc.load(model, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, compiled.eval()(ids).logits)


@pytest.mark.usefixtures("process_group")
def test_data_parallel_wrapping() -> None:
    compiled, alone = compiled_llama(), compiled_llama()
    alone.load_state_dict(compiled.state_dict())
    alone.base.load_state_dict(compiled.base.state_dict())
    assert train(DistributedDataParallel(compiled), 3) == pytest.approx(train(alone, 3), rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "vit", "whisper"])
def test_pickles_and_copies_of_real_models(model_type: str) -> None:
    compiled = peftc.compile(tiny(model_type), peftc.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    inputs = inputs_for(model_type)
    expected = compiled(**inputs)[0]
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(other(**inputs)[0], expected)
        other.set_adapter("default")
        assert torch.equal(other(**inputs)[0], expected)
        with other.disable_adapter():
            assert not torch.equal(other(**inputs)[0], expected)
    host = next(iter(compiled.program.installed))
    layer = copy.deepcopy(compiled.base.get_submodule(host))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    assert again.peftc.code.text == layer.peftc.code.text


def test_state_dicts_carry_the_adapters() -> None:
    one, two = compiled_llama(init_lora_weights=False), compiled_llama()
    two.load_state_dict(one.state_dict())
    ids = token_ids(2, 5, 64)
    other = tiny("llama")
    other.load_state_dict({k: v for k, v in one.base.state_dict().items() if ".lora_" not in k})
    assert torch.equal(two(ids).logits, one(ids).logits)


def test_calls_pass_everything_on() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(
            self, x: Any, /, y: Any = 1, *more: Any, act: Any = torch.relu, flag: bool = False, **rest: Any
        ) -> Any:
            return act(self.fc(x)) * y, more, flag, rest

    model = Odd()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["fc"]))
    x = torch.randn(3, 2)
    for args, kwargs in (((x,), {}), ((x, 2, 3, 4), {"flag": True, "a": 1}), ((x,), {"y": 3, "act": torch.tanh})):
        ours, theirs = compiled(*args, **kwargs), model(*args, **kwargs)
        assert torch.equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]


def test_the_call_has_the_models_signature() -> None:
    """Trainers read the names of forward's parameters to know which columns to keep."""
    import inspect

    compiled = compiled_llama()
    ours = inspect.signature(compiled.forward).parameters
    theirs = inspect.signature(tiny("llama").forward).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_attributes_of_the_model_are_forwarded() -> None:
    compiled = compiled_llama()
    assert compiled.config is compiled.base.config
    assert compiled.device == torch.device("cpu")
    assert compiled.get_input_embeddings() is compiled.base.model.embed_tokens
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = compiled.no_such_thing


def test_trainable_parameters_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    compiled = compiled_llama()
    compiled.print_trainable_parameters()
    trainable, total = compiled.get_nb_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )


def test_inference_mode_freezes() -> None:
    compiled = compiled_llama(inference_mode=True)
    assert compiled.get_nb_trainable_parameters()[0] == 0
