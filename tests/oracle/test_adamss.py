"""AdaMSS against peft: subspaces that stop learning, as in training there; whose rows a file does not say."""

import copy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import quietly
from tests.support.models import tiny, token_ids

FIELDS: dict[str, Any] = {
    "num_subspaces": 4,
    "subspace_rank": 2,
    "target_modules": ["q_proj", "v_proj"],
    "use_asa": True,
    "asa_target_subspaces": 6,
    "init_warmup": 1,
    "final_warmup": 9,
    "mask_interval": 2,
}
IDS = token_ids(4, 9, 64)


def start(folder: Path) -> tuple[nn.Module, Any]:
    """A model, and peft's on it, whose fresh adapter is in `folder`."""
    model = tiny("llama")
    torch.manual_seed(0)
    theirs: Any = quietly(peft.get_peft_model, copy.deepcopy(model), peft.AdamssConfig(**FIELDS))
    theirs.save_pretrained(folder)
    return model, theirs


def train(model: Any, act: Any) -> list[float]:
    """The losses of ten steps with momentum, decay and clipping, of which the masked have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.SGD(trained, lr=2.0, momentum=0.9, weight_decay=0.01), []
    for step in range(1, 11):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimiser.step()
        act(step)
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def learning(compiled: Any) -> int:
    """How many subspaces still learn."""
    return sum(int(t[:, 2].sum()) for n, t in compiled.named_parameters() if "adamss_sizes" in n)


def test_the_same_subspaces_stop_as_in_peft(tmp_path: Path) -> None:
    model, theirs = start(tmp_path)
    expected = train(theirs, theirs.base_model.update_and_allocate)
    ours = peftc.load(model, tmp_path, is_trainable=True)
    losses = train(ours, lambda step: None)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    left = sum(p.requires_grad for n, p in theirs.named_parameters() if ".adamss_A." in n)
    assert learning(ours) == left < 24
    near(ours.eval()(IDS).logits, theirs.eval()(IDS).logits, 1e-4, "logits")


def test_a_script_with_peft_s_callback_trains_the_same(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from peftc.peft.tuners.adamss.asa_callback import AdamssAsaCallback

    data = [{"input_ids": row, "labels": row} for row in IDS]
    model, theirs = start(tmp_path / "start")
    ours: Any = served.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True)
    from peft.tuners.adamss.asa_callback import AdamssAsaCallback as Theirs

    for one, callback in ((theirs, Theirs()), (ours, AdamssAsaCallback())):
        settings = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 0.05, "report_to": "none"}
        arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, **settings)
        Trainer(one, arguments, train_dataset=data, callbacks=[callback]).train()
    near(ours.eval()(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits, 1e-4, "logits")


def test_a_fresh_adapter_has_peft_s_subspaces(tmp_path: Path) -> None:
    """And directions in them that hold as much of the rows as those that peft finds by a random method."""
    model, theirs = start(tmp_path)
    ours = peftc.compile(model, peftc.AdamssConfig(**FIELDS))
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    for name, module in theirs.base_model.model.named_modules():
        if not name.endswith(("q_proj", "v_proj")):
            continue
        own = ours.base.get_submodule(name)
        right = own.adamss_newB["default"]
        near(right, module.adamss_newB["default"], 1e-5, "singular vectors")
        values = (module.base_layer.weight @ right.mT).norm(dim=0)
        assert torch.equal(own.adamss_rows["default"].long(), module.scatter_index["default"])
        for number, factor in enumerate(module.adamss_A["default"]):
            rank = int(own.adamss_sizes["default"][number, 1])
            mine = own.adamss_A["default"][number, :rank]
            assert len(factor) == rank
            rows = (module.base_layer.weight @ right.mT)[module.seg_result["default"][number]] / values
            assert (rows @ mine.mT).norm() > (rows @ factor.mT).norm() - 1e-4


def test_files_say_which_rows_they_are_and_those_that_do_not_are_held_to_the_base(tmp_path: Path) -> None:
    model, _ = start(tmp_path)
    compiled = peftc.compile(model, peftc.AdamssConfig(**FIELDS))
    compiled.save_pretrained(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert any(key.endswith("adamss_rows") for key in tensors)
    other = tiny("llama", seed=5)
    assert peftc.load(other, tmp_path / "ours", verify="files").plan.edits  # It says which rows it means.
    with pytest.raises(peftc.CheckpointError, match=r"subspaces have .* rows"):
        peftc.load(other, tmp_path)


def test_factors_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model, _ = start(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("adamss_A.1"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(peftc.CheckpointError, match="not every subspace has an A of the rank of its B"):
        peftc.load(model, tmp_path)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(peftc.RuleError, match=r"pip install 'peftc\[adamss\]'"):
        peftc.compile(tiny("llama"), peftc.AdamssConfig(**FIELDS))


def test_wrong_fields_are_refused() -> None:
    for fields, message in (
        ({"r": 0}, "r: got 0"),
        ({"use_asa": True, "final_warmup": 20}, "final_warmup=20 is no later than init_warmup=50"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval=0: with use_asa it has to be above 0"),
        ({"init_weights": "zeros"}, "init_weights"),
    ):
        with pytest.raises(peftc.SpecError, match=message):
            peftc.AdamssConfig(**fields)
    assert peftc.AdamssConfig(mask_interval=0, init_weights=False).init_weights is None
