"""Poly against peft: outputs, gradients and files; tasks of batches, beams and mixed batches; what is refused."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import perturbed, quietly
from tests.support.methods import gradients
from tests.support.models import tiny
from tests.support.prompts import generated, ids

TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "opt": ["v_proj", "out_proj"],
    "t5": ["q", "wo"],
    "bert": ["query", "value"],
}
# Without a kind of model, peft passes task_ids on to the model itself.
KINDS = {"llama": "CAUSAL_LM", "opt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}
TASKS = torch.tensor([0, 2, 1, 1])
IDS = ids(4, 7)


def fields(family: str = "llama", **more: Any) -> dict[str, Any]:
    given = {"r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "target_modules": TARGETS[family]}
    return {**given, "task_type": KINDS[family], **more}


def both(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any, Any]:
    """A model, an adapter of it in peft, and what its files are here."""
    torch.manual_seed(0)
    net = tiny(family).to(dtype).eval()
    theirs = perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), peft.PolyConfig(**fields(family, **more))), 2)
    quietly(theirs.save_pretrained, folder / "theirs")
    return net, theirs.eval(), peftc.load(net, folder / "theirs", is_trainable=True).eval()


def logits(model: Any, tokens: Tensor = IDS, **more: Any) -> Tensor:
    double = {"decoder_input_ids": ids(len(tokens), 5, 3)} if model.config.is_encoder_decoder else {}
    given = {"task_ids": TASKS[: len(tokens)], **more}
    output = model(input_ids=tokens, **double, **{name: value for name, value in given.items() if value is not None})
    return output[0]


def same_gradients(ours: Any, theirs: Any, within: float, **more: Any) -> None:
    for model in (ours, theirs):
        model.zero_grad()
        logits(model, **more).float().square().mean().backward()
    own, other = gradients(ours), gradients(theirs)
    assert own.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in other.values())
    for name, value in other.items():
        near(own[name].float(), value.float(), within, f"gradients of {name}", largest)


@pytest.mark.parametrize("family", TARGETS)
def test_outputs_gradients_and_files_are_those_of_peft(family: str, tmp_path: Path) -> None:
    net, theirs, ours = both(tmp_path, family)
    y = logits(ours)
    near(y, logits(theirs), 1e-5, "outputs")
    base = logits(net, task_ids=None)
    for task in range(3):
        assert not torch.allclose(logits(ours, task_ids=torch.full((4,), task)), base, atol=1e-3), (
            "it changes something"
        )
    near(logits(ours, task_ids=torch.full((4,), 2))[1], y[1], 1e-5, "outputs of a row among others of its task")
    same_gradients(ours, theirs, 1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(logits(again), y, 1e-5, "outputs of peft, from files of peftc")
    near(logits(peftc.load(net, tmp_path / "ours")), y, 0, "outputs, loaded again")


@pytest.mark.parametrize(("family", "targets"), [("opt", ["fc1", "fc2"]), ("bert", ["dense"])])
def test_modules_that_get_tokens_or_one_vector_a_row_have_their_rows_tasks(family: str, targets: list[str]) -> None:
    """Where peft fails, which takes inputs of three dimensions only."""
    ours = perturbed(peftc.compile(tiny(family), peftc.PolyConfig(**fields(family, target_modules=targets))).eval(), 2)
    y = ours(input_ids=IDS, task_ids=TASKS)[-1 if family == "bert" else 0]
    for row in range(4):
        one = ours(input_ids=IDS[row : row + 1], task_ids=TASKS[row : row + 1])
        near(y[row], one[-1 if family == "bert" else 0][0], 1e-5, f"outputs of row {row}")


def test_half_precision(tmp_path: Path) -> None:
    _, theirs, ours = both(tmp_path, dtype=torch.bfloat16)
    y = logits(ours)
    assert y.dtype == torch.bfloat16
    near(y.float(), logits(theirs).float(), 2e-2, "bfloat16: outputs")
    same_gradients(ours, theirs, 4e-2)


def test_what_is_drawn_while_training_is_what_peft_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, theirs, ours = both(tmp_path)
    fixed = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "rand", lambda *a, **k: fixed.clone())
    monkeypatch.setattr(torch, "rand_like", lambda like, **k: fixed.clone())
    y = logits(ours)
    for model in (ours, theirs):
        model.train()
    near(logits(ours), logits(theirs), 1e-5, "outputs in train()")
    same_gradients(ours, theirs, 1e-4)
    assert not torch.allclose(logits(ours), y, atol=1e-4)


def test_a_fresh_one_is_the_base_and_begins_as_in_peft() -> None:
    net = tiny("llama").eval()
    torch.manual_seed(0)
    ours = peftc.compile(net, peftc.PolyConfig(**fields(r=8, n_skills=8, init_weights=False)))
    theirs = quietly(
        peft.get_peft_model, copy.deepcopy(net), peft.PolyConfig(**fields(r=8, n_skills=8, init_weights=False))
    )
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name in ("poly_lora_A.default", "poly_lora_B.default", "poly_router.default.module_logits"):
        mine, its = (
            torch.cat([value.detach().flatten() for key, value in found.items() if key.endswith(name)])
            for found in (own, other)
        )
        near(mine.std(), its.std(), 0.05, f"spread of {name}")
        near(mine.abs().max(), its.abs().max(), 0.05, f"bound of {name}")
    fresh = peftc.compile(net, peftc.PolyConfig(**fields()))
    assert torch.equal(logits(fresh), logits(net, task_ids=None))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generated_tokens_are_those_of_peft_and_of_every_row_alone(family: str, tmp_path: Path) -> None:
    net, theirs, ours = both(tmp_path, family)
    found = generated(ours, IDS, task_ids=TASKS)
    assert torch.equal(found, generated(theirs, IDS, task_ids=TASKS))
    assert not torch.equal(found, generated(net, IDS))
    # peft does not know of beams, nor of several sequences for a prompt.
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        several = options.get("num_return_sequences", 1)
        made = generated(ours, IDS, task_ids=TASKS, **options).unflatten(0, (4, several))
        for row in range(4):
            alone = generated(ours, IDS[row : row + 1], task_ids=TASKS[row : row + 1], **options)
            assert torch.equal(made[row], alone), (row, options)


def test_rows_of_a_batch_have_adapters_and_tasks_of_their_own(tmp_path: Path) -> None:
    net = tiny("llama").eval()
    specs = {
        "a": peftc.PolyConfig(**fields()),
        "b": peftc.PolyConfig(**fields(n_tasks=2, n_skills=3)),
        "c": peftc.LoraConfig(r=2, target_modules=TARGETS["llama"]),
    }
    ours = peftc.compile(net, specs)
    for seed, name in enumerate(specs):
        ours.set_adapter(name)
        perturbed(ours, seed)
    ours.eval()
    names, tasks = ["a", "__base__", "b", "c"], torch.tensor([2, 9, 1, 7])
    together = logits(ours, task_ids=tasks, adapter_names=names)
    new = generated(ours, IDS, task_ids=tasks, adapter_names=names)
    with pytest.raises(peftc.AdapterError, match=r"'b' asks for: an integer from 0 to 1 .*got \[2\]"):
        logits(ours, task_ids=torch.tensor([2, 9, 2, 7]), adapter_names=names)
    for row, name in enumerate(names):
        ours.set_adapter([] if name == "__base__" else name)
        one, task = IDS[row : row + 1], tasks[row : row + 1]
        near(together[row], logits(ours, one, task_ids=task)[0], 1e-5, f"row {row}")
        assert torch.equal(new[row], generated(ours, one, task_ids=task)[0])


def test_several_are_switched_disabled_and_taken_off(tmp_path: Path) -> None:
    net, _, ours = both(tmp_path)
    y, base = logits(ours), logits(net, task_ids=None)
    ours.add_adapter("b", peftc.PolyConfig(**fields(n_tasks=1)))
    ours.add_adapter("c", peftc.LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]))
    near(logits(ours), y, 0, "outputs beside others")
    for names in ("b", []):
        ours.set_adapter(names)
        near(logits(ours, task_ids=torch.zeros(4, dtype=torch.long)), base, 0, "outputs of what changes nothing")
    ours.set_adapter("c")
    near(logits(ours), logits(ours, task_ids=None), 0, "outputs of one that does not ask")
    ours.set_adapter("default")
    with ours.disable_adapter():
        near(logits(ours), base, 0, "outputs, disabled")
    near(logits(ours), y, 0, "outputs, switched back")
    assert torch.equal(logits(ours.unload(), task_ids=None), base)


def test_merging_is_refused_with_the_reason(tmp_path: Path) -> None:
    _, _, ours = both(tmp_path)
    with pytest.raises(peftc.MergeError, match="every task has a weight of its own"):
        ours.merge_adapter()


def test_exporting_is_refused_with_the_reason(tmp_path: Path) -> None:
    _, _, ours = both(tmp_path)
    with pytest.raises(peftc.ExportError, match="'default' asks about the model's call"):
        ours.export(tmp_path / "program", to="pt2", adapters="inside")
    assert not (tmp_path / "program").exists()


def test_it_learns_under_gradient_checkpointing(tmp_path: Path) -> None:
    _, _, ours = both(tmp_path)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.train().gradient_checkpointing_enable()
            ours.train()
        torch.manual_seed(4)
        ours.train().zero_grad()
        ours(input_ids=IDS, labels=IDS, task_ids=TASKS).loss.backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        near(found[1][name], gradient, 1e-6, f"gradients of {name}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"the call has no task_ids, which adapter 'default' asks for: an integer from 0 to 2"),
        (torch.tensor([0, 1]), "got 2 for 4 rows"),
        (torch.tensor([[0, 1, 2, 0]]), r"got torch.int64 of shape \(1, 4\)"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), "got torch.float32"),
        (torch.tensor([0, 1, 2, 3]), r"got \[0, 1, 2, 3\]"),
        (torch.tensor([0, 1, 2, -1]), r"got \[0, 1, 2, -1\]"),
        ("first", "got 'first'"),
    ],
)
def test_task_ids_are_looked_at(given: Any, said: str, tmp_path: Path) -> None:
    _, _, ours = both(tmp_path)
    with pytest.raises(peftc.AdapterError, match=said):
        logits(ours, task_ids=given)
    with pytest.raises(peftc.AdapterError, match=said):
        generated(ours, IDS, task_ids=given)
    near(logits(ours, task_ids=[0, 2, 1, 1]), logits(ours), 0, "outputs for a list")


def test_the_base_alone_can_not_be_told_of_tasks(tmp_path: Path) -> None:
    _, _, ours = both(tmp_path)
    with pytest.raises(
        peftc.AdapterError, match="'default' takes task_ids of the call, which only calls of the compiled"
    ):
        ours.base(IDS)


def test_a_module_that_gets_rows_of_another_kind_is_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1))

    spec = peftc.PolyConfig(r=2, n_tasks=2, target_modules=["fc"])
    ours = peftc.compile(Windows(), spec)
    with pytest.raises(peftc.AdapterError, match="a module gets 6 rows in a call of 3"):
        ours(torch.randn(3, 6, 4), task_ids=[0, 1, 1])


def test_a_model_that_has_an_argument_of_that_name_gets_it() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
            return self.fc(x) + (0 if task_ids is None else task_ids[:, None, None])

    net = Asks()
    ours, x, tasks = (
        peftc.compile(net, peftc.PolyConfig(r=2, n_tasks=2, target_modules=["fc"])),
        torch.randn(2, 3, 4),
        torch.tensor([0, 1]),
    )
    assert torch.equal(ours(x, task_ids=tasks), net(x, task_ids=tasks))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(peftc.NoMatchError, match="n_splits=5 does not divide its 32 inputs"):
        peftc.compile(tiny("llama"), peftc.PolyConfig(n_splits=5, target_modules=["q_proj"]))
    for wrong in ({"n_tasks": 0}, {"n_skills": 0}, {"n_splits": 0}, {"r": 0}, {"poly_type": "mhr"}):
        with pytest.raises(peftc.SpecError, match=next(iter(wrong))):
            peftc.PolyConfig(**wrong)


def test_scripts_for_peft_run(tmp_path: Path) -> None:
    _, theirs, _ = both(tmp_path)
    torch.manual_seed(0)
    net = tiny("llama").eval()
    model = served.PeftModel.from_pretrained(net, str(tmp_path / "theirs"), is_trainable=True)
    near(logits(model), logits(theirs), 1e-5, "outputs")
    assert torch.equal(generated(model, IDS, task_ids=TASKS), generated(theirs, IDS, task_ids=TASKS))
    config = served.PolyConfig(**fields())
    fresh = served.get_peft_model(tiny("llama"), config)
    fresh(input_ids=IDS, labels=IDS, task_ids=TASKS).loss.backward()
    fresh.save_pretrained(tmp_path / "fresh")
    quietly(peft.PeftModel.from_pretrained, tiny("llama"), str(tmp_path / "fresh"))
