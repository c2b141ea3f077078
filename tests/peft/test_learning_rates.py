"""LoRA+: the groups that peft makes, and the same steps."""

import importlib
from typing import Any

import peft
import pytest
import torch

import peftc.peft
from tests.support.models import model_of
from tests.support.scripts import base, filled

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
FIELDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "tokens": {"trainable_token_indices": [3]},
    "biases": {"target_modules": ["query"], "bias": "all"},
    "norms with biases": {"target_modules": ["query"], "modules_to_save": ["LayerNorm"], "lora_bias": True},
}


def made(lib: Any, name: str, **more: Any) -> tuple[Any, Any]:
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], **FIELDS[name]}
    given = model_of("bert") if fields["target_modules"] == ["query"] else base()
    model = filled(lib.get_peft_model(given, lib.LoraConfig(**fields)))
    create = importlib.import_module(f"{lib.__name__}.optimizers").create_loraplus_optimizer
    return model, create(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4, **more)


def groups(model: Any, optimizer: Any) -> list[Any]:
    names = {id(p): name.replace(".base_layer", "") for name, p in model.named_parameters()}
    return [
        (
            group["lr"],
            group["weight_decay"],
            group["eps"],
            sorted(
                names[id(p)].replace("token_adapter.", "").replace("vector.default.weight", "vector.default")
                for p in group["params"]
            ),
        )
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "more", [{}, {"loraplus_lr_embedding": 3e-4, "loraplus_weight_decay": 0.1, "eps": 1e-6}], ids=["plain", "given"]
)
def test_the_groups_are_those_of_peft(name: str, more: dict[str, Any]) -> None:
    theirs, ours = (groups(*made(lib, name, **more)) for lib in (peft, peftc.peft))
    assert ours == theirs


def test_steps_are_those_of_peft() -> None:
    losses: list[list[float]] = []
    for lib in (peft, peftc.peft):
        model, optimizer = made(lib, "embedding", loraplus_lr_embedding=1e-2, loraplus_weight_decay=0.1)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
