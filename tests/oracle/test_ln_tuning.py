"""LN-tuning against peft: outputs, gradients, files both ways and merging, on norms and on what else is named."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftc
from tests.support.methods import assert_near, compare, gradients, in_peft
from tests.support.models import tiny, token_ids


class Net(nn.Module):
    """Norms with and without a bias, and one of each op that peft copies, too."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.l = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.t, self.b, self.c = Conv1D(8, 6), nn.RMSNorm(8), nn.Conv1d(8, 4, 3, groups=2)
        self.g, self.n = nn.GroupNorm(2, 4), nn.LayerNorm(5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.g(self.c(self.b(self.t(self.l(self.a(self.e(x))))).mT)))


X = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
TARGETS = {"norms": ["a", "b", "g", "n"], "all": ["e", "a", "l", "t", "b", "c", "g", "n"]}


@pytest.mark.parametrize("targets", TARGETS)
def test_outputs_gradients_and_files(targets: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LNTuningConfig(target_modules=TARGETS[targets])
    _, ours = compare(Net(), X, config, tmp_path)
    assert {edit.slots for edit in ours.plan.edits} == {("weight",)}


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, ours = compare(Net().bfloat16(), X, peft.LNTuningConfig(target_modules=TARGETS["norms"]), tmp_path, within=1e-5)
    assert {p.dtype for n, p in ours.named_parameters() if "ln_tuning_" in n} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_defaults_of_real_models(kind: str, tmp_path: Path) -> None:
    model, ids = tiny(kind), token_ids(2, 5, 64)
    inputs: dict[str, Any] = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    theirs = in_peft(model, peft.LNTuningConfig())
    theirs.save_pretrained(tmp_path)
    ours = peftc.load(model, tmp_path, is_trainable=True).eval()
    assert_near(ours(**inputs).logits, theirs(**inputs).logits, 1e-5, "logits")
    for one in (ours, theirs):
        one(**inputs).logits.square().sum().backward()
    own, expected = gradients(ours), gradients(theirs)
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(own[name], gradient, 1e-4, name)
    fresh = peftc.compile(model, peftc.LNTuningConfig())
    with torch.no_grad():
        assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


def test_of_several_active_ones_the_last_stands() -> None:
    """peft refuses a call with two; here it is as with trained biases."""
    model, x = nn.Sequential(nn.LayerNorm(8)), torch.randn(2, 8)
    spec = peftc.LNTuningConfig(target_modules=["0"])
    compiled = peftc.compile(model, {"a": spec, "b": spec})
    with torch.no_grad():
        for number, name in enumerate("ab", start=2):
            for tensor in compiled.adapter_state_dict(name).values():
                tensor *= number
    compiled.set_adapter(["a", "b"])
    both = compiled(x)
    compiled.set_adapter("b")
    assert torch.equal(compiled(x), both)


def test_statistics_are_refused() -> None:
    with pytest.raises(peftc.NoMatchError, match=r"keeps statistics.*modules_to_save"):
        peftc.compile(nn.Sequential(nn.BatchNorm1d(4)), peftc.LNTuningConfig(target_modules=["0"]))
