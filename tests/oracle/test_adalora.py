"""AdaLoRA against peft: outputs, gradients, files both ways with the ranks that are left, and a training run."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import peftc
import peftc.peft
from tests.support.methods import HALF, LINEARS, ROWS, Linears, assert_near, compare, freeze_ranknum
from tests.support.models import tiny, token_ids


class Convolutions(nn.Module):
    """Two-dimensional ones, with a kernel and without."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.k = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(torch.tanh(self.c(x)))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"init_lora_weights": False},
    "fields": {"lora_alpha": 3, "lora_dropout": 0.1, "bias": "lora_only", "init_r": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linears", "convolutions"])
def test_outputs_gradients_and_files(kind: str, variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x, targets = (Linears(), ROWS, LINEARS) if kind == "linears" else (Convolutions(), IMAGES, ["c", "k"])
    config = peft.AdaLoraConfig(total_step=10, target_modules=targets, **VARIANTS[variant])
    compare(net, x, config, tmp_path, within=4e-6, moved=0.5)


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(total_step=10, target_modules=LINEARS)
    compare(Linears().bfloat16(), ROWS.bfloat16(), config, tmp_path, within=HALF, merged=4e-2, moved=0.5)


SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "deltaT": 2}
TARGETS = ["q_proj", "down_proj"]
STEPS = 12


class Regression(nn.Module):
    """A loss in float64 all the way: where a model rounds to float32, scores that are nearly equal change places."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = Linears(), nn.Linear(4, 4)

    def forward(self, x: Tensor, target: Tensor | None = None) -> SequenceClassifierOutput:
        y = self.other(torch.tanh(self.net(x)))
        return SequenceClassifierOutput(loss=None if target is None else (y - target).square().mean(), logits=y)


def masks(state: dict[str, Tensor]) -> dict[str, list[bool]]:
    return {key.partition(".lora_E")[0]: (E != 0).flatten().tolist() for key, E in state.items() if ".lora_E" in key}


def trained(model: Any, allot: Any, state: Any) -> tuple[list[dict[str, list[bool]]], list[float]]:
    """The masks after every step, and the losses."""
    x, target = ROWS.double(), torch.linspace(-2, 2, 60).double().reshape(3, 5, 4)
    seen, losses = list[dict[str, list[bool]]](), list[float]()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for step in range(1, STEPS + 1):
        loss = model(x, target).loss
        loss.backward()
        optimiser.step()
        allot(step)
        optimiser.zero_grad()
        seen.append(masks(state()))
        losses.append(loss.item())
    model.eval()
    return seen, losses


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_run_allots_the_same_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Regression().double(), ROWS.double()
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.AdaLoraConfig(target_modules=[*LINEARS, "other"], **SCHEDULE)
    )
    theirs.double()  # ranknum is in float32 else.
    freeze_ranknum(theirs)
    theirs.save_pretrained(tmp_path / "start")
    ours = peftc.load(base, tmp_path / "start", is_trainable=True)
    face = peftc.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "start", is_trainable=True)

    def theirs_state() -> dict[str, Tensor]:
        named = theirs.named_parameters()
        return {name.replace(".default", ""): p.detach() for name, p in named if ".lora_" in name}

    # Without task_type, peft's PeftModel leaves the penalty out: its inner model has it.
    expected, losses = trained(theirs.base_model, theirs.base_model.update_and_allocate, theirs_state)
    # The optimiser's own steps do it here; by PEFT's names it is done by hand.
    for model, allot in ((ours, lambda step: None), (face, face.base_model.update_and_allocate)):
        compiled = model if model is ours else face.compiled
        found, own = trained(model, allot, compiled.adapter_state_dict)
        assert found == expected
        torch.testing.assert_close(torch.tensor(own), torch.tensor(losses))
    left = [sum(map(sum, seen.values())) for seen in expected]
    assert left[1] == 24, "no step before tinit takes any"
    assert left[-1] == 8, "target_r for each of four sites"
    assert len({sum(kept) for kept in expected[-1].values()}) > 1, "the sites have different ranks"
    for model, folder in ((theirs, "theirs"), (ours, "ours"), (face, "face")):
        model.save_pretrained(tmp_path / folder)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours", "face")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] == configs[2]["rank_pattern"]
    saved, others = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: t.shape for key, t in others.items()}
    y = theirs(x).logits
    for reader, folder in ((peftc.load, "theirs"), (peftc.load, "ours"), (peft.PeftModel.from_pretrained, "ours")):
        again: Any = reader(copy.deepcopy(base), str(tmp_path / folder))
        assert_near(again.eval()(x).logits, y, 1e-7, folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss_has_the_penalty_of_peft_in_train_only() -> None:
    base, ids = tiny("llama"), token_ids(2, 5, 64)
    config = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "total_step": 10, "orth_reg_weight": 0.3}
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**config)).train()
    ours = peftc.compile(base, peftc.AdaLoraConfig(**config)).train()
    with torch.no_grad():
        own = dict(ours.base.named_parameters())
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                own[name.removeprefix("base_model.model.")].copy_(parameter)
    plain = base(input_ids=ids, labels=ids).loss
    assert_near(ours(input_ids=ids, labels=ids).loss, theirs(input_ids=ids, labels=ids).loss, 1e-6, "loss")
    assert_near(ours.penalty() + plain, theirs(input_ids=ids, labels=ids).loss, 1e-6, "the term of it")
    assert float(ours.penalty().detach()) > 0.1
    ours.penalty().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if "lora_A" in n or "lora_B" in n)
    # peft adds it to the loss that is evaluated, too.
    torch.testing.assert_close(ours.eval()(input_ids=ids, labels=ids).loss, plain)
    assert float(theirs.eval()(input_ids=ids, labels=ids).loss - plain) > 0.1


def test_what_has_grown_again_between_two_allotments_is_in_the_file(tmp_path: Path) -> None:
    """peft's file drops it: the model that is read is another than the one that was saved."""
    torch.manual_seed(0)
    net = Linears()
    spec = peftc.AdaLoraConfig(init_r=4, target_r=2, total_step=20, deltaT=4, target_modules=LINEARS)
    compiled = peftc.compile(net, spec)
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=0.05)
    for _ in range(6):
        compiled(ROWS).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    compiled.save_pretrained(tmp_path)
    again = peftc.load(net, tmp_path)
    torch.testing.assert_close(again(ROWS), compiled(ROWS))
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, deltaT=4, target_modules=LINEARS)
    theirs: Any = peft.get_peft_model(copy.deepcopy(net), config)
    optimiser = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 7):
        theirs(ROWS).square().sum().backward()
        optimiser.step()
        theirs.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    read: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "theirs")).eval()
    assert not torch.allclose(read(ROWS), theirs.eval()(ROWS), atol=1e-3)


def test_an_adapter_with_ranks_that_are_left_is_trained_and_saved_again(tmp_path: Path) -> None:
    net, kept = Linears(), {"l.lora_E": [True, False, True], "c.lora_E": [False] * 3, "n.lora_E": [False, True, True]}
    spec = peftc.AdaLoraConfig(init_r=3, target_r=1, total_step=4, target_modules=LINEARS, rank_pattern=kept)
    compiled = peftc.compile(net, spec)
    assert compiled.adapter_state_dict()["base_model.model.l.lora_A"].shape == (2, 8)
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        compiled(ROWS).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    compiled.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, found.values())) == 3
    assert all(was or not now for name in kept for was, now in zip(kept[name], found[name], strict=True))
    for again in (peftc.load(net, tmp_path), peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()):
        torch.testing.assert_close(again(ROWS), compiled(ROWS))


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(peftc.SpecError, match="total_step is missing"):
        peftc.AdaLoraConfig()
    with pytest.raises(peftc.SpecError, match=r"total_step=10 leaves no step .* tinit=5 and tfinal=5"):
        peftc.AdaLoraConfig(total_step=10, tinit=5, tfinal=5)
    with pytest.raises(peftc.SpecError, match="use_dora=True is not implemented"):
        peftc.AdaLoraConfig(total_step=10, use_dora=True)
    with pytest.warns(UserWarning, match="r=16 is not used: the rank at the start is init_r"):
        peftc.AdaLoraConfig(total_step=10, r=16)
    with pytest.raises(peftc.NoMatchError, match="its 2 groups have weights that"):
        peftc.compile(
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), peftc.AdaLoraConfig(total_step=9, target_modules=["0"])
        )
    lora = peftc.compile(Linears(), peftc.LoraConfig(target_modules=LINEARS))
    with pytest.raises(peftc.AdapterError, match="lora_A holds tensors of another method here"):
        lora.add_adapter("b", peftc.AdaLoraConfig(total_step=9, target_modules=LINEARS))
    assert list(lora.peft_config) == ["default"]


def test_a_trainer_allots_ranks_without_a_callback(tmp_path: Path) -> None:
    """In peft it takes one; here the steps of its optimiser do it. Sites may be left with none."""
    from transformers import Trainer, TrainingArguments

    base, ids = tiny("llama"), token_ids(16, 9, 64)
    spec = peftc.AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=1, total_step=8, tfinal=1)
    compiled = peftc.compile(base, spec)
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "run"), save_strategy="no", **options)
    trainer = Trainer(compiled, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    assert sum(map(sum, masks(compiled.adapter_state_dict()).values())) == 6
    trainer.save_model(str(tmp_path / "saved"))
    again = peftc.load(base, tmp_path / "saved")
    assert sum(len(E) for key, E in again.adapter_state_dict().items() if "lora_E" in key) == 6
    torch.testing.assert_close(again(ids).logits, compiled.eval()(ids).logits)
