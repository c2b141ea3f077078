"""DoRA against peft: outputs, gradients, files both ways, merging, on linear, embedding and convolution sites."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc


class Net(nn.Module):
    """One site of each op, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.n = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(5, 4, bias=False)
        self.c = nn.Conv1d(6, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(self.l(self.e(x)).mT).mT)


X = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


def theirs(init: Any, dropout: float) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = Net()
    targets = ["e", "l", "c", "n"] if isinstance(init, bool) else ["l", "n"]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, use_dora=True, target_modules=targets, lora_dropout=dropout, init_lora_weights=init
    )
    model: Any = peft.get_peft_model(copy.deepcopy(net), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return net, model.eval()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "olora"])
def test_outputs_gradients_and_files(init: Any, dropout: float, tmp_path: Path) -> None:
    net, model = theirs(init, dropout)
    model.save_pretrained(tmp_path / "theirs")
    ours = peftc.load(net, tmp_path / "theirs", is_trainable=True).eval()
    for one in (model, ours):
        one(X).square().sum().backward()
    torch.testing.assert_close(ours(X), model(X), rtol=1e-5, atol=1e-5)
    gradients = {n.replace(".weight", ""): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            own = gradients[name.replace("base_model.model.", "base.").replace(".weight", "")]
            torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    if isinstance(init, bool) or init == "gaussian":
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"))
        torch.testing.assert_close(again(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_fresh_one_is_the_base_and_merging_is_undone_to_the_bit() -> None:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)  # torch takes other ways through a product for what requires gradients.
    spec = peftc.LoraConfig(r=2, use_dora=True, target_modules=["e", "l", "c", "n"])
    model = peftc.compile(net, spec).eval()
    with torch.no_grad():
        assert torch.equal(model(X), net(X))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    y, before = model(X), {name: value.clone() for name, value in model.state_dict().items()}
    with model.merged():
        torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).to(dtype)
    model: Any = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "1"]))
    x = torch.randn(4, 32, dtype=dtype)
    ours = peftc.compile(net, peftc.LoraConfig(r=2, use_dora=True, target_modules=["0", "1"])).eval()
    assert torch.equal(ours(x), net(x))
    torch.testing.assert_close(ours(x), model.eval()(x), rtol=2e-2, atol=2e-2)


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peftc.NoMatchError, match="scales what the weight gives; lora_bias"):
        peftc.compile(Net(), peftc.LoraConfig(use_dora=True, lora_bias=True, target_modules=["l"]))
    model = peftc.compile(Net(), {"a": peftc.LoraConfig(use_dora=True, target_modules=["l"])})
    with pytest.raises(peftc.CheckpointError, match=r"(is no sum of products|servers take LoRA)"):
        model.save_pretrained(tmp_path, form="serving")
    model.add_adapter("b", peftc.LoraConfig(use_dora=True, target_modules=["l"]))
    with pytest.raises(peftc.AdapterError, match="magnitudes"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
