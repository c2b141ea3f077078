"""Mixed batches of a whole program: every row gets what it gets with modules, and alone, forward and backward."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.programs import gradients, loss_of, program_inputs, program_model, tensors

ROWS = ["a", "__base__", "b", "c", "a", "b", "b"]
ALL: Any = "all-linear"


def lora(targets: Any = ALL, **fields: Any) -> peftc.LoraConfig:
    return peftc.LoraConfig(target_modules=targets, **fields)


MIXES: dict[str, dict[str, Any]] = {
    "products": {"a": lora(r=4), "b": lora(r=2, lora_alpha=7, use_rslora=True), "c": lora(r=3, lora_alpha=-2)},
    "methods": {
        "a": lora(r=4, use_dora=True),
        "b": peftc.IA3Config(target_modules=ALL, feedforward_modules=[]),
        "c": lora(r=3, lora_alpha=-2),
    },
    "weights": {
        "a": peftc.LoHaConfig(r=2, target_modules=ALL),
        "b": lora(r=2),
        "c": peftc.OFTConfig(target_modules=ALL),
    },
}
FAST = ("llama", "gpt2")
KINDS = {
    "llama": "products",
    "gpt2": "methods",
    "bert": "methods",
    "t5": "products",
    "vit": "weights",
    "opt": "methods",
}


def both(model: Any, specs: dict[str, Any], inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """The model with adapters far from fresh, as modules and as a program."""
    torch.manual_seed(0)
    one = perturb(peftc.compile(model, specs)).eval()
    other = peftc.compile(model, specs, capture="export", inputs=inputs, **options).eval()
    other.load_state_dict(one.state_dict())
    return one, other


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert expected
    for name, value in expected.items():
        scale = float(value.detach().abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else (pytest.mark.slow,)) for kind in KINDS]
)
def test_rows_are_what_they_are_with_modules_and_alone(kind: str) -> None:
    model = program_model(kind)
    one, other = both(model, MIXES[KINDS[kind]], program_inputs(kind, model, labels=False))
    inputs = program_inputs(kind, model, len(ROWS), 9, labels=False)
    with torch.no_grad():
        together = tensors(other(**inputs, adapter_names=ROWS))
        close(together, tensors(one(**inputs, adapter_names=ROWS)))
        for name in ("a", "b", "c", "__base__"):
            rows = [row for row, own in enumerate(ROWS) if own == name]
            other.set_adapter([] if name == "__base__" else name)
            own = tensors(other(**{key: value[rows] for key, value in inputs.items()}))
            close({key: value[rows] for key, value in together.items()}, own)
        swapped = tensors(other(**inputs, adapter_names=ROWS[::-1]))
    assert not all(torch.allclose(swapped[name], value, atol=1e-3) for name, value in together.items())


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["products", "methods"])
@pytest.mark.parametrize("passes", [False, True])
def test_every_adapter_learns_from_its_own_rows(mix: str, passes: bool) -> None:
    model = program_model("llama")
    options: dict[str, Any] = {"passes": peftc.program_passes()} if passes else {}
    one, other = both(model, MIXES[mix], program_inputs("llama", model), **options)
    inputs = program_inputs("llama", model, len(ROWS), 9)
    for compiled in (one, other):
        compiled.set_adapter([])
        for name in MIXES[mix]:
            compiled.set_requires_grad(name, True)
        loss_of(compiled.train()(**inputs, adapter_names=ROWS)).backward()
    expected = gradients(one)
    assert len({name.split(".")[-2] for name in expected} & {"a", "b", "c"}) >= 1
    close(gradients(other), expected)


def test_two_graphs_for_train_and_eval() -> None:
    """A model that does other things in train() has two graphs; rows are right in both."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()) if self.training else self.first(self.second(x))

    torch.manual_seed(0)
    model = Modes()
    specs = {"a": lora(["first", "second"], r=2), "b": lora(["first"], r=1)}
    one, other = both(model, specs, {"x": torch.randn(2, 4)})
    x, rows = torch.randn(4, 4), ["b", "a", "__base__", "a"]
    for training in (True, False):
        close({"y": other.train(training)(x, adapter_names=rows)}, {"y": one.train(training)(x, adapter_names=rows)})


@pytest.mark.slow
def test_saved_modules_and_several_uses_of_a_weight() -> None:
    model = program_model("bert")
    specs = {"a": lora(["query"], r=2, modules_to_save=["classifier"]), "b": lora(["dense"], r=2), "c": lora(["key"])}
    one, other = both(model, specs, program_inputs("bert", model, labels=False))
    inputs = program_inputs("bert", model, len(ROWS), 9, labels=False)
    close(tensors(other(**inputs, adapter_names=ROWS)), tensors(one(**inputs, adapter_names=ROWS)))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.linear(self.embed(ids)).relu())

    mixed = {"a": lora(["embed", "linear"], r=2), "b": peftc.LoHaConfig(r=2, target_modules=["linear"])}
    one, other = both(Twice(), mixed, {"ids": torch.arange(6).view(2, 3)})
    ids, rows = torch.arange(8).view(4, 2), ["a", "__base__", "b", "a"]
    close({"y": other(ids, adapter_names=rows)}, {"y": one(ids, adapter_names=rows)})


def test_threads_switches_copies_and_what_is_made_once() -> None:
    model = program_model("llama")
    specs = MIXES["products"]
    _, other = both(model, specs, program_inputs("llama", model, labels=False))
    inputs = program_inputs("llama", model, 3, 9, labels=False)
    alone: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in specs:
            other.set_adapter(name)
            alone[name] = other(**inputs).logits
    wrong: list[str] = []

    def call(name: str) -> None:
        for _ in range(4):
            with torch.no_grad():
                found = other(**inputs, adapter_names=[name, "__base__", name]).logits
            if not torch.allclose(found[::2], alone[name][::2], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=call, args=(name,)) for name in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(other(**inputs).logits, alone["c"])  # The active one, as before.
    codes = len(other.program.made.codes)
    with torch.no_grad():
        other(**inputs, adapter_names=["a", "c", "b"])
        other(**inputs, adapter_names=["c", "a", "b"])
    assert len(other.program.made.codes) == codes  # One graph for all names.
    again = copy.deepcopy(other)
    assert torch.equal(
        again(**inputs, adapter_names=["a", "b", "c"]).logits, other(**inputs, adapter_names=["a", "b", "c"]).logits
    )


def test_a_flat_graph_of_torch_fx_mixes_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    specs = {"a": lora(["0", "2"], r=2), "b": peftc.IA3Config(target_modules=["2"], feedforward_modules=[])}
    one = perturb(peftc.compile(model, specs))
    other = peftc.compile(model, specs, capture="symbolic")
    other.load_state_dict(one.state_dict())
    x, rows = torch.randn(4, 4), ["b", "a", "__base__", "a"]
    close({"y": other(x, adapter_names=rows)}, {"y": one(x, adapter_names=rows)})


@pytest.mark.slow
def test_what_rows_share_is_refused() -> None:
    model = program_model("mixtral")
    spec = lora(["q_proj"], target_parameters=["experts.gate_up_proj"])
    program = peftc.compile(model, spec, capture="export", inputs=program_inputs("mixtral", model))
    with pytest.raises(peftc.AdapterError, match="adapted as a weight, which all rows share"):
        program(**program_inputs("mixtral", model), adapter_names=["default", "__base__"])
    llama = program_model("llama")
    saved = peftc.compile(
        llama, lora(["q_proj"], modules_to_save=["norm"]), capture="export", inputs=program_inputs("llama", llama)
    )
    with pytest.raises(peftc.AdapterError, match=r"norm is saved whole, and is more than one op.*set_adapter"):
        saved(**program_inputs("llama", llama), adapter_names=["default", "__base__"])
    with pytest.raises(peftc.AdapterError, match="3 names for a batch of 2"):
        saved(**program_inputs("llama", llama), adapter_names=["__base__"] * 3)
