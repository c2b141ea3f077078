"""Mixed batches: every row gets what it would get alone with its adapter, forward and backward."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc.rewrite.batched import batched_products
from peftc.rewrite.mixed import mixed
from peftc.rewrite.route import add_products, current
from tests.support.adapters import perturb
from tests.support.models import Everything, Net, inputs_for, tiny, token_ids
from tests.support.prompts import generated
from tests.support.snapshots import assert_unchanged, snapshot

ROWS = ["a", "__base__", "b", "c", "a", "b", "b"]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj", "wte", "wpe"],
    "opt": ["q_proj", "fc1", "fc2"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "bert": ["query", "dense"],
    "vit": ["q_proj", "v_proj", "projection"],
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "fc1"],
}


def lora(targets: list[str], **fields: Any) -> peftc.LoraConfig:
    return peftc.LoraConfig(target_modules=targets, **fields)


def three(model: nn.Module, targets: list[str], **options: Any) -> peftc.CompiledModel:
    """Three LoRAs of other ranks, scalings and targets."""
    specs = {
        "a": lora(targets, r=4),
        "b": lora(targets[:2], r=2, lora_alpha=7, use_rslora=True),
        "c": lora(targets[1:], r=3, lora_alpha=-2),
    }
    return perturb(peftc.compile(model, specs, **options))


@contextmanager
def alone(compiled: peftc.CompiledModel, name: str) -> Iterator[None]:
    """The model with that one adapter, or without any."""
    compiled.set_adapter([] if name == "__base__" else name)
    yield


def rows_of(value: Any, row: int) -> Any:
    return {key: tensor[row : row + 1] for key, tensor in value.items()}


def batch(model_type: str) -> dict[str, Tensor]:
    """Inputs with a row for each of ROWS."""
    inputs = inputs_for(model_type)
    generator = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(len(ROWS), *value.shape[1:], generator=generator)
        if value.is_floating_point()
        else torch.randint(3, 60, (len(ROWS), *value.shape[1:]), generator=generator)
        for key, value in inputs.items()
        if key != "attention_mask"
    }


def assert_rows_as_alone(
    compiled: peftc.CompiledModel, inputs: dict[str, Tensor], names: list[str], tolerance: float = 2e-6
) -> None:
    before = compiled.active_adapters
    with torch.no_grad():
        together = first(compiled(**inputs, adapter_names=names))
    assert compiled.active_adapters == before
    for row, name in enumerate(names):
        with alone(compiled, name), torch.no_grad():
            own = first(compiled(**rows_of(inputs, row)))
        torch.testing.assert_close(together[row : row + 1], own, rtol=1e-4, atol=tolerance * float(own.abs().max()))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("model_type", TARGETS)
def test_rows_are_what_they_are_alone(model_type: str) -> None:
    compiled = three(tiny(model_type), TARGETS[model_type])
    inputs = batch(model_type)
    assert_rows_as_alone(compiled, inputs, ROWS)
    with torch.no_grad():
        outputs = [first(compiled(**inputs, adapter_names=[name] * len(ROWS))) for name in ("a", "b", "__base__")]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_lora_sites_take_two_batched_products_and_no_loop() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    with torch.profiler.profile() as profile:
        compiled(input_ids=token_ids(3, 4, 60), adapter_names=["a", "b", "c"])
    calls = {event.key: event.count for event in profile.key_averages()}
    sites = len({edit.site for edit in compiled.plan.edits})
    assert calls["aten::bmm"] + calls.get("aten::baddbmm", 0) == 2 * sites


@pytest.mark.parametrize(
    "names", [["a"] * 4, ["a", "a", "b", "b"], ["__base__"] * 3 + ["c"], ["a"] * 9 + ["b", "c"], ["b"]], ids=str
)
def test_groups_of_any_sizes(names: list[str]) -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    ids = torch.randint(3, 60, (len(names), 5), generator=torch.Generator().manual_seed(2))
    assert_rows_as_alone(compiled, {"input_ids": ids}, names)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"], ["a", "a", "b"], ["__base__", "b"]])
def test_what_others_have_is_not_written_to(names: list[str]) -> None:
    compiled = perturb(peftc.compile(nn.Sequential(nn.Linear(4, 5)), {n: lora(["0"], r=2) for n in "ab"}))
    parts = {n: next(iter(compiled.program.adapters[n].parts.values())) for n in names if n != "__base__"}
    x, y = torch.randn(len(names), 7, 4), torch.randn(len(names), 7, 5)
    before = y.clone()
    with torch.no_grad(), mixed(compiled.program, names):
        current.get().note((x,), {})
        other = add_products(y, x, parts, fresh=False)
        assert torch.equal(y, before)
        own = add_products(y, x, parts, fresh=True)
    torch.testing.assert_close(own, other)
    assert not torch.equal(other, before)


@pytest.mark.parametrize("with_y", [True, False])
def test_products_of_several_have_first_and_second_derivatives(with_y: bool) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64)[:, None, None]
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (2, 4), (5, 2), (5, 2)]
    y, x, *factors = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def of(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        return batched_products(y if with_y else None, x, scale, factors[:2], factors[2:])

    each = [x[i] @ factors[i].T @ factors[2 + i].T * scale[i] + (y[i] if with_y else 0) for i in range(2)]
    torch.testing.assert_close(of(y, x, *factors), torch.stack(each))
    inputs = (y, x, *factors) if with_y else (y.detach(), x, *factors)
    assert torch.autograd.gradcheck(of, inputs)
    assert torch.autograd.gradgradcheck(of, inputs)
    by_functorch = torch.func.grad(lambda x: of(y, x, *factors).square().sum())(x)
    torch.testing.assert_close(by_functorch, torch.autograd.grad(of(y, x, *factors).square().sum(), x)[0])


def test_methods_kinds_and_saved_modules_mix() -> None:
    specs = {
        "a": lora(["linear", "conv2d", "embed", "transposed"], r=2, modules_to_save=["head"]),
        "b": peftc.IA3Config(
            target_modules=["linear", "conv1d"], feedforward_modules=["linear"], modules_to_save=["head"]
        ),
        "c": lora(["linear", "conv3d"], r=3, lora_bias=True),
    }
    compiled = perturb(peftc.compile(Everything().eval(), specs))
    assert_rows_as_alone(compiled, {"ids": token_ids(len(ROWS))}, ROWS)


def test_images() -> None:
    specs = {"a": lora(["conv", "fc"], r=2), "b": lora(["fc"], r=4), "c": lora(["out"], r=1, init_lora_weights="pissa")}
    compiled = perturb(peftc.compile(Net().eval(), specs))
    assert_rows_as_alone(compiled, {"x": torch.randn(len(ROWS), 3, 8, 8)}, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    compiled = three(tiny("llama").to(dtype), TARGETS["llama"], autocast_adapter_dtype=autocast)
    inputs = batch("llama")
    assert compiled(**inputs, adapter_names=ROWS).logits.dtype is dtype
    with torch.no_grad():
        together = compiled(**inputs, adapter_names=ROWS).logits
        for row, name in enumerate(ROWS):
            with alone(compiled, name):
                own = compiled(**rows_of(inputs, row)).logits
            torch.testing.assert_close(together[row : row + 1], own, rtol=0.05, atol=0.05 * float(own.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "t5", "bart"])
def test_generation(model_type: str, options: dict[str, Any]) -> None:
    compiled = three(tiny(model_type), TARGETS[model_type])
    ids = torch.randint(3, 60, (len(ROWS), 6), generator=torch.Generator().manual_seed(4))
    together = generated(compiled, ids, adapter_names=ROWS, **options)
    for row, name in enumerate(ROWS):
        with alone(compiled, name):
            assert torch.equal(together[row : row + 1], generated(compiled, ids[row : row + 1], **options)), name


def gradients(compiled: peftc.CompiledModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in compiled.named_parameters() if p.grad is not None}
    compiled.zero_grad(set_to_none=True)
    return found


def losses(compiled: peftc.CompiledModel, ids: Tensor, names: list[str] | None = None) -> Tensor:
    """The sum of the losses of the rows."""
    more = {} if names is None else {"adapter_names": names}
    logits = compiled(input_ids=ids, **more).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def apart(compiled: peftc.CompiledModel, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(names):
        if name != "__base__":
            compiled.set_adapter(name)
            losses(compiled, ids[[row for row, other in enumerate(names) if other == name]]).backward()
            found |= {key: grad for key, grad in gradients(compiled).items() if name in key.split(".")}
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_adapters_learn_in_one_batch_what_they_learn_apart(model_type: str, checkpointing: bool | None) -> None:
    compiled = three(tiny(model_type), TARGETS[model_type]).train()
    for module in compiled.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "dropout" in module.__dict__:
            module.dropout = 0.0
    ids = torch.randint(3, 60, (len(ROWS), 6), generator=torch.Generator().manual_seed(4))
    expected = apart(compiled, ids, ROWS)
    compiled.set_adapter("c")
    compiled.set_requires_grad(["a", "b"])
    if checkpointing is not None:
        compiled.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        compiled.enable_input_require_grads()
    losses(compiled, ids, ROWS).backward()
    assert_same_gradients(gradients(compiled), expected)
    # Two forwards before their backwards: every recomputation has its own rows.
    other = [*ROWS[3:], *ROWS[:3]]
    total = losses(compiled, ids, ROWS) + losses(compiled, ids, other)
    total.backward()
    twice = gradients(compiled)
    compiled.gradient_checkpointing_disable()
    second = apart(compiled, ids, other)
    assert_same_gradients(twice, {key: expected[key] + second[key] for key in expected})
    assert compiled.active_adapters == ["b"]


def test_ia3_learns_in_one_batch_too() -> None:
    specs = {
        n: peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]) for n in "ab"
    }
    compiled = perturb(peftc.compile(tiny("llama"), specs))
    ids, names = token_ids(4, 6, 60), ["a", "b", "__base__", "a"]
    expected = apart(compiled, ids, names)
    compiled.set_adapter(["a", "b"])
    losses(compiled, ids, names).backward()
    assert len(expected) == 12
    assert_same_gradients(gradients(compiled), expected)


def test_only_the_adapters_of_the_batch_get_gradients() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    compiled.set_adapter(["a", "b", "c"])
    losses(compiled, token_ids(2, 5, 60), ["a", "c"]).backward()
    assert {key.split(".")[-2] for key in gradients(compiled)} == {"a", "c"}


def test_a_broken_adapter_spoils_its_own_rows_only() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    compiled.set_adapter(["a", "b", "c"])
    with torch.no_grad():
        compiled.base.model.layers[0].self_attn.v_proj.lora_B.b.weight.fill_(float("nan"))
    ids = token_ids(len(ROWS), 5, 60)
    logits = compiled(input_ids=ids, adapter_names=ROWS).logits
    broken = torch.tensor([name == "b" for name in ROWS])
    assert torch.equal(logits.isnan().flatten(1).any(1), broken)
    logits[~broken].square().sum().backward()
    found = gradients(compiled)
    assert all(bool(grad.isfinite().all()) for key, grad in found.items() if ".b." not in key)


def test_dropout_is_live_in_training() -> None:
    model = tiny("llama")
    specs = {"a": lora(["q_proj"], r=4, lora_dropout=0.5), "b": lora(["q_proj"], r=2, lora_dropout=0.5)}
    other = {**specs, "b": lora(["q_proj"], r=2, lora_dropout=0.1)}
    for chosen in (specs, other):
        compiled = perturb(peftc.compile(model, chosen))
        ids, names = token_ids(2, 5, 60), ["a", "b"]
        y = compiled(input_ids=ids, adapter_names=names).logits
        assert torch.equal(compiled(input_ids=ids, adapter_names=names).logits, y)
        compiled.train()
        assert not torch.equal(compiled(input_ids=ids, adapter_names=names).logits, y)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    compiled.set_adapter("b")
    ids = token_ids(2, 5, 60)
    before, y = snapshot(compiled), compiled(input_ids=ids).logits
    with pytest.raises(IndexError):
        compiled(input_ids=ids + 1000, adapter_names=["a", "b"])
    assert_unchanged(compiled, before)
    assert not compiled.base._forward_pre_hooks
    assert torch.equal(compiled(input_ids=ids).logits, y)


def test_calls_nest_and_take_positional_tensors() -> None:
    compiled, inner = three(tiny("llama"), TARGETS["llama"]), three(tiny("gpt2"), TARGETS["gpt2"])
    ids = token_ids(2, 5, 60)
    expected = inner(ids, adapter_names=["c", "a"]).logits
    seen: list[Tensor] = []
    hook = lambda *_: seen.append(inner(ids, adapter_names=["c", "a"]).logits)  # noqa: E731
    compiled.base.model.norm.register_forward_hook(hook)
    compiled(ids, adapter_names=["a", "b"])
    assert torch.equal(seen[0], expected)


def test_wrong_names_and_states_are_refused() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    ids = token_ids(4, 5, 60)

    def refused(names: Any, match: str, error: Any = peftc.AdapterError) -> None:
        with pytest.raises(error, match=match):
            compiled(input_ids=ids, adapter_names=names)

    refused(["a", "b"], "2 names for a batch of 4")
    refused(["a"] * 5, "5 names for a batch of 4")
    refused("a", "a list with one adapter name per row")
    refused([], "a list with one adapter name per row")
    refused(["a", "b", "base", "a"], "no adapter 'base'; there are a, b, c, __base__")
    compiled.merge_adapter()
    refused(["a"] * 4, r"unmerge_adapter\(\) first", peftc.MergeError)
    compiled.unmerge_adapter()
    with compiled.disable_adapter():
        refused(["a"] * 4, "disabled")
    compiled.add_adapter("p", peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    refused(["a", "p", "a", "a"], "'p' can't share a batch: a prompt method")
    biased = peftc.compile(tiny("opt"), lora(["q_proj"], bias="lora_only"))
    with pytest.raises(peftc.AdapterError, match="biases of the base model, which all rows share"):
        biased(input_ids=ids, adapter_names=["default"] * 4)


class Odd(nn.Module):
    """A linear that gets what `turn` makes of the batch."""

    def __init__(self, turn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.turn = nn.Linear(4, 4), turn

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.turn(x)).sum() + x


class Positions(nn.Module):
    """Learned positions, looked up without a batch, or with one row for all."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.a, self.rows = nn.Embedding(8, 4), rows

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return x + self.a(positions[None] if self.rows else positions)


TURNED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "packed": (Odd(lambda x: x.flatten(0, 1)[:6]), (3, 5, 4)),
    "positions first": (Odd(lambda x: x.transpose(0, 1)), (3, 6, 4)),
    "positions first, as many": (Odd(lambda x: x.transpose(0, 1)), (3, 3, 4)),
    "twice": (Odd(lambda x: torch.cat([x, x])), (3, 5, 4)),
    "positions": (Positions(rows=False), (3, 6, 4)),
    "positions, as many": (Positions(rows=False), (3, 3, 4)),
    "torch's own encoder": (nn.TransformerEncoderLayer(4, 2, 4), (6, 3, 4)),
}


@pytest.mark.parametrize("case", TURNED)
def test_a_module_whose_rows_cannot_be_told_is_refused(case: str) -> None:
    model, shape = TURNED[case]
    targets = ["linear1"] if case.startswith("torch") else ["a"]
    compiled = perturb(peftc.compile(model, {n: lora(targets, r=2) for n in "ab"}))
    with pytest.raises(peftc.AdapterError, match=r"can't be told|positions before rows"):
        compiled(torch.randn(shape), adapter_names=["a", "b", "a"] if shape[0] == 3 else ["a", "b"] * 3)
    assert compiled.program.calls == 0


def test_one_row_of_positions_is_for_all() -> None:
    compiled = perturb(peftc.compile(Positions(rows=True), {n: lora(["a"], r=2) for n in "abc"}))
    assert_rows_as_alone(compiled, {"x": torch.randn(len(ROWS), 5, 4)}, ROWS)


def test_architectures_that_turn_rows_around_are_refused() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=32)
    compiled = peftc.compile(transformers.XLNetModel(config), {n: lora(["layer_1"], r=2) for n in "ab"})
    with pytest.raises(peftc.AdapterError, match="positions before rows"):
        compiled(input_ids=token_ids(2, 5, 60), adapter_names=["a", "b"])


def test_saved_modules_with_more_than_one_tensor_are_refused() -> None:
    """An attention saved whole would append the keys of all groups to one cache."""
    spec = peftc.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1.self_attn"], layers_to_transform=[0])
    compiled = perturb(peftc.compile(tiny("llama"), dict.fromkeys("ab", spec)))
    with pytest.raises(peftc.AdapterError, match="is called with other than one tensor"):
        compiled(input_ids=token_ids(2, 5, 60), adapter_names=["a", "b"])


def test_saved_modules_without_rows_in_their_output_are_refused() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x))[1]

    spec = peftc.LoraConfig(target_modules=["a"], r=2, modules_to_save=["head"])
    compiled = perturb(peftc.compile(Summed(), dict.fromkeys("ab", spec)))
    with pytest.raises(peftc.AdapterError, match="without a row for every sequence"):
        compiled(torch.randn(3, 5, 4), adapter_names=["a", "b", "b"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_models_own_is_refused(reentrant: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=reentrant)

    x = torch.randn(2, 4, requires_grad=True)
    compiled = perturb(peftc.compile(Own(), {n: lora(["a"], r=2) for n in "ab"}))
    with pytest.raises(peftc.AdapterError, match=r"under torch\.utils\.checkpoint"):
        compiled(x, adapter_names=["a", "b"])
    with torch.no_grad():
        compiled(x, adapter_names=["a", "b"])


def test_nothing_is_switched_inside_a_call() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    ids, refused = token_ids(2, 5, 60), []
    actions: list[Callable[[], Any]] = [
        lambda: compiled.set_adapter("b"),
        lambda: compiled.enable_adapters(False),
        lambda: compiled.merge_adapter(),
        lambda: copy.deepcopy(compiled),
        lambda: compiled.add_adapter("d", lora(["q_proj"])),
        lambda: compiled.delete_adapter("c"),
        lambda: compiled.unload(),
    ]

    def hook(*_: Any) -> None:
        for action in actions:
            with pytest.raises(peftc.AdapterError, match="adapter_names"):
                action()
            refused.append(action)

    expected = compiled(input_ids=ids, adapter_names=["c", "a"]).logits
    before = snapshot(compiled)
    handle = compiled.base.model.norm.register_forward_hook(hook)
    assert torch.equal(compiled(input_ids=ids, adapter_names=["c", "a"]).logits, expected)
    handle.remove()
    assert refused == actions
    assert_unchanged(compiled, before)


def test_calls_in_other_threads_do_not_meet() -> None:
    """Each thread has its own names, or none; all run at once, and one even in the middle of another's call."""
    compiled = three(tiny("llama"), TARGETS["llama"])
    ids = token_ids(2, 5, 60)
    choices: list[list[str] | None] = [["a", "b"], ["c", "__base__"], None, ["b", "b"]]

    def run(names: list[str] | None) -> Tensor:
        with torch.no_grad():
            return compiled(input_ids=ids, **({} if names is None else {"adapter_names": names})).logits

    expected = [run(names) for names in choices]
    wrong: list[int] = []

    def often(number: int) -> None:
        for _ in range(15):
            if not torch.allclose(run(choices[number]), expected[number], atol=1e-5):
                wrong.append(number)

    def hook(*_: Any) -> None:
        handle.remove()
        inside = threading.Thread(target=often, args=(2,))
        inside.start()
        inside.join()

    handle = compiled.base.model.embed_tokens.register_forward_hook(hook)
    run(choices[0])
    threads = [threading.Thread(target=often, args=(number,)) for number in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(run(None), expected[2])


def test_forward_does_not_pass_names_over() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    with pytest.raises(peftc.AdapterError, match="call the model itself"):
        compiled.forward(input_ids=token_ids(2, 5, 60), adapter_names=["a", "b"])


def test_base_rows_keep_every_bit_beside_narrower_adapters() -> None:
    compiled = three(tiny("llama"), TARGETS["llama"])
    for name, parameter in compiled.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    ids = token_ids(3, 5, 60)
    together = compiled(input_ids=ids, adapter_names=["a", "__base__", "b"]).logits
    with compiled.disable_adapter():
        torch.testing.assert_close(together[1:2], compiled(input_ids=ids[1:2]).logits, rtol=1e-6, atol=1e-6)


def test_deep_copies_and_many_sets_of_names() -> None:
    compiled = perturb(peftc.compile(tiny("llama"), {f"n{i}": lora(["q_proj"], r=1 + i % 3) for i in range(12)}))
    ids = token_ids(3, 4, 60)
    for i in range(80):
        compiled(input_ids=ids, adapter_names=[f"n{i % 12}", f"n{i * 5 % 12}", f"n{(i // 12 + 1) % 12}"])
    assert len(compiled.program.made.runs) <= 64
    other = copy.deepcopy(compiled)
    names = ["n1", "n2", "n11"]
    assert torch.equal(
        other(input_ids=ids, adapter_names=names).logits, compiled(input_ids=ids, adapter_names=names).logits
    )
