"""LoRA-FA and the Riemannian optimiser: the steps that peft takes, and what is refused."""

from typing import Any

import peft
import peft.optimizers.lorafa
import pytest
import torch

import peftc.peft
from peftc.peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer  # type: ignore[import-not-found]
from tests.support.scripts import base, filled

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])


def adapted(lib: Any, **fields: Any) -> Any:
    config = lib.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    return filled(lib.get_peft_model(base(), config)).train()


def losses_of(model: Any, optimizer: Any) -> list[float]:
    found: list[float] = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def factors(model: Any) -> dict[str, Any]:
    return {name.replace(".base_layer", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def frozen(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if "lora_" in name and not parameter.requires_grad}


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}}],
    ids=["plain", "rslora", "patterns and a head"],
)
def test_lorafa_steps_as_in_peft(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT rounds the product to bfloat16 where it can.
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    theirs, ours = (adapted(lib, **fields) for lib in (peft, peftc.peft))
    how: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "weight_decay": 0.1}
    makers = (peft.optimizers.create_lorafa_optimizer, create_lorafa_optimizer)
    wanted, got = (
        losses_of(model, make(model=model, **how)) for model, make in zip((theirs, ours), makers, strict=True)
    )
    assert got == pytest.approx(wanted, rel=1e-5)
    assert got[-1] < got[0]
    assert frozen(ours) == frozen(theirs) != set()


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD], ids=lambda cls: cls.__name__)
def test_riemannian_steps_as_in_peft(optimiser: Any) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    theirs, ours = (adapted(lib, **fields) for lib in (peft, peftc.peft))
    wanted = losses_of(theirs, peft.optimizers.create_riemannian_optimizer(theirs, optimiser, lr=1e-2, reg=1e-3))
    got = losses_of(ours, create_riemannian_optimizer(ours, optimiser, lr=1e-2, reg=1e-3))
    assert got == pytest.approx(wanted, rel=1e-5)
    assert got[-1] < got[0]
    for name, factor in factors(ours).items():
        torch.testing.assert_close(factor, factors(theirs)[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(factor, factors(adapted(peftc.peft, **fields))[name])


def test_what_they_refuse() -> None:
    model = adapted(peftc.peft)
    with pytest.raises(ValueError, match="LBFGS steps by a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-2)
    with pytest.raises(ValueError, match="takes no closure"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2).step(lambda: 0.0)
    with pytest.raises(TypeError, match="expected a class of optimisers"):
        create_riemannian_optimizer(model, torch.nn.Linear, lr=1e-2)
    with pytest.raises(ValueError, match="adapter 'default' says otherwise"):
        create_lorafa_optimizer(model, 4, 8, 1e-2, use_rslora=True)
    with pytest.warns(FutureWarning, match="leave it out"):
        create_lorafa_optimizer(model, 4, 8, 1e-2, use_rslora=False)
    with pytest.raises(ValueError, match="no lora_A and lora_B train"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)  # A is frozen now.
    model.set_adapter("default")  # The advice.
    create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)


def test_embeddings_and_convolutions_learn_with_lorafa_too() -> None:
    model = adapted(peftc.peft, target_modules=["embed_tokens", "q_proj"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    losses_of(model, create_lorafa_optimizer(model, 4, 8, 1e-2))
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_A" not in name}
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    conv = filled(peftc.peft.get_peft_model(layer, peftc.peft.LoraConfig(r=2, target_modules=["0", "2"])))
    optimizer = create_lorafa_optimizer(conv, 2, 8, 1e-2)
    first = conv(torch.ones(1, 3, 3, 3)).square().sum()
    first.backward()
    optimizer.step()
    assert conv(torch.ones(1, 3, 3, 3)).square().sum() < first
