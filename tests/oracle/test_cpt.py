"""Context-aware prompt tuning against peft: loss, gradients, steps of an optimiser, generation, files both ways."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftc
import peftc.peft as served
from tests.support.against import near
from tests.support.interchange import quietly
from tests.support.models import tiny
from tests.support.prompts import generated, ids, in_peft, padded

FAMILIES = ["llama", "gpt2"]
EXAMPLES, KINDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [1, 2, 2, 3, 4, 5, 6, 0, 7, 8]
IDS = ids()
OWN = torch.tensor([[1, 2, 2, 3, 4, 5, 8], [1, 2, 3, 4, 4, 0, 0]])


def spec(**more: Any) -> peftc.CPTConfig:
    given = {"cpt_token_ids": EXAMPLES, "cpt_tokens_type_mask": KINDS, "task_type": "CAUSAL_LM"}
    return peftc.CPTConfig(**{**given, "opt_projection_epsilon": 0.5, **more})


def both(
    family: str = "llama", dtype: torch.dtype = torch.float32, moved: float = 0.05, **more: Any
) -> tuple[Any, Any, Any]:
    """A model, an adapter of it whose embeddings have moved, some of them too far, and the same in peft."""
    torch.manual_seed(0)
    net = tiny(family).to(dtype).eval()
    ours = peftc.compile(net, spec(**more)).eval()
    with torch.no_grad():
        ours.prompt_encoder["default"].delta_embedding.weight.normal_().mul_(moved)
    return net, ours, in_peft(ours, net)


def inputs(own: Tensor | None = None) -> dict[str, Any]:
    mask = {} if own is None else {"input_type_mask": own.clone()}
    return {
        "input_ids": IDS,
        "attention_mask": padded("right"),
        "labels": IDS.masked_fill(padded("right") == 0, -100),
        **mask,
    }


def gradient(model: Any) -> Tensor:
    return model.prompt_encoder["default"].delta_embedding.weight.grad


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_outputs_and_gradients_are_those_of_peft(family: str, decay: float | None, own: Tensor | None) -> None:
    more = {} if decay is None else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    net, ours, theirs = both(family, **more)
    found, expected = (model(**inputs(own)) for model in (ours, theirs))
    near(found.loss, expected.loss, 1e-5, "loss")
    near(found.logits, expected.logits, 1e-5, "outputs")
    assert abs(float(found.loss.detach() - net(**inputs()).loss)) > 1e-3
    for output in (found, expected):
        output.loss.backward()
    near(gradient(ours), gradient(theirs), 1e-4, "gradients of delta_embedding")
    labels = torch.tensor(KINDS) % 4 == 0
    assert not bool(gradient(ours)[labels].any())
    assert bool(gradient(ours)[~labels].any(1).all())
    near(ours(**inputs(own), return_dict=False)[0], found.loss, 0, "loss in a tuple")


def test_half_precision() -> None:
    _, ours, theirs = both(dtype=torch.bfloat16)
    found, expected = (model(**inputs()) for model in (ours, theirs))
    near(found.loss.float(), expected.loss.float(), 2e-2, "bfloat16: loss")
    near(found.logits.float(), expected.logits.float(), 2e-2, "bfloat16: outputs")
    for output in (found, expected):
        output.loss.backward()
    near(gradient(ours), gradient(theirs), 6e-2, "bfloat16: gradients of delta_embedding")


def test_training_is_that_of_peft() -> None:
    _, ours, theirs = both(moved=0.0)
    made = []
    for model in (ours, theirs):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(8):
            loss = model(**inputs(OWN)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        made.append((torch.stack(losses), model.get_prompt_embedding_to_save("default")))
    near(made[0][0], made[1][0], 1e-4, "losses")
    near(made[0][1], made[1][1], 1e-4, "rows")
    assert made[0][0][-1] < made[0][0][0]
    encoder = ours.prompt_encoder["default"]
    norms = encoder.delta_embedding.weight.norm(dim=1)
    scale = (32 / 2048) ** 0.5
    for norm, kind in zip(norms.tolist(), KINDS, strict=True):
        assert norm <= scale * {0: 0.0, 1: 0.1, 2: 0.5, 3: 0.1}[kind % 4] * (1 + 1e-6) + 1e-9
    assert bool((norms[torch.tensor(KINDS) % 4 != 0] > 0.05 * scale).all())


def test_it_begins_as_the_base_with_the_examples_before() -> None:
    net = tiny("llama").eval()
    ours = peftc.compile(net, spec()).eval()
    whole = torch.cat([torch.tensor(EXAMPLES).expand(2, -1), IDS], 1)
    near(ours(IDS).logits, net(whole).logits, 1e-5, "outputs")
    assert torch.equal(generated(ours, IDS), generated(net, whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_peft(family: str) -> None:
    _, ours, theirs = both(family, moved=1.0, opt_projection_epsilon=50.0, opt_projection_format_epsilon=50.0)
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(generated(ours, IDS, **options), generated(theirs, IDS, **options))


@pytest.mark.parametrize("trainable", [False, True])
def test_files_go_both_ways(trainable: bool, tmp_path: Path) -> None:
    net, ours, theirs = both()
    y = ours(**inputs()).logits
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys() == {"prompt_embeddings"}
    near(one["prompt_embeddings"], other["prompt_embeddings"], 1e-6, "rows")
    for name in ("ours", "theirs"):
        again = peftc.load(net, tmp_path / name, is_trainable=trainable).eval()
        near(again(**inputs()).logits, y, 1e-5, f"outputs, from files of {name}")
        near(again(**inputs()).loss, ours(**inputs()).loss, 1e-5, f"loss, from files of {name}")
        assert again.get_nb_trainable_parameters()[0] == (10 * 32 if trainable else 0)
        if trainable:
            again(**inputs()).loss.backward()
            assert bool(gradient(again).any())
    # With its own file beside, how far the rows have moved is known.
    delta = peftc.load(net, tmp_path / "ours", is_trainable=True).prompt_encoder["default"].delta_embedding.weight
    assert torch.equal(delta, ours.prompt_encoder["default"].delta_embedding.weight)
    back = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(tmp_path / "ours")).eval()
    near(back(**inputs()).logits, y, 1e-5, "outputs of peft, from files of peftc")


def test_default_kinds_have_a_loss_which_is_nan_in_peft() -> None:
    _, ours, theirs = both(cpt_tokens_type_mask=None)
    own = torch.full_like(IDS, 4)
    kept = own.clone()
    assert torch.isnan(theirs(**inputs()).loss)
    near(ours(**inputs()).loss, ours(**inputs(own)).loss, 0, "loss of kinds that are given")
    assert torch.equal(own, kept)
    # As the usual loss, but for the first token of the call, which the examples predict.
    logits = ours(IDS).logits[:, 9:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs()["labels"].flatten())
    near(ours(**inputs()).loss, expected, 1e-5, "loss")


def test_adapters_of_other_names_have_their_own_loss() -> None:
    _, ours, _ = both()
    ours.add_adapter("b", spec(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.0))
    ours.set_adapter("b")
    _, alone, _ = both(moved=0.0, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.0)
    near(ours(**inputs()).loss, alone(**inputs()).loss, 1e-6, "loss")


def test_it_is_switched_disabled_kept_from_merging_and_taken_off() -> None:
    net, ours, _ = both()
    base = net(**inputs())
    ours.add_adapter("b", peftc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    ours.add_adapter("c", peftc.LoraConfig(r=2, target_modules=["q_proj"]))
    y = ours(**inputs())
    with ours.disable_adapter():
        near(ours(**inputs(OWN)).loss, base.loss, 0, "loss, disabled")
    ours.set_adapter(["default", "c"])
    near(ours(**inputs()).loss, y.loss, 1e-6, "loss with LoRA that changes nothing")
    ours.set_adapter(["default", "b"])
    assert ours(IDS).logits.shape[1] == 19
    with pytest.raises(peftc.AdapterError, match=r"a loss of its own, .*there are 2 tokens of other adapters"):
        ours(**inputs())
    ours.set_adapter("default")
    with pytest.raises(peftc.MergeError, match="virtual tokens are no part of a weight"):
        ours.merge_adapter()
    with pytest.raises(peftc.AdapterError, match="a prompt method changes the length of every row"):
        ours(IDS, adapter_names=["default", "__base__"])
    assert torch.equal(ours.unload()(IDS).logits, net(IDS).logits)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (torch.ones(2, 6, dtype=torch.long), r"input_type_mask is \(2, 6\), and labels are \(2, 7\)"),
        (
            torch.ones(7, dtype=torch.long),
            r"of at least 0 for every token of every row; got torch.int64 of shape \(7,\)",
        ),
        (torch.ones(3, 7, dtype=torch.long), "got 3 for 2 rows"),
        (-torch.ones(2, 7, dtype=torch.long), "got"),
        (torch.ones(2, 7), "got torch.float32"),
    ],
)
def test_kinds_are_looked_at(own: Tensor, said: str) -> None:
    _, ours, _ = both()
    with pytest.raises(peftc.AdapterError, match=said):
        ours(**inputs(own))


def test_labels_and_logits_of_the_last_tokens_alone_are_refused() -> None:
    _, ours, _ = both()
    given = {name: value for name, value in inputs().items() if name != "labels"}
    with pytest.raises(
        peftc.AdapterError, match=r"with labels of 3 tokens that takes 13 logits a row, .* gave 3\. Leave"
    ):
        ours(**given, labels=IDS[:, -3:], logits_to_keep=3)
    whole = torch.cat([torch.full_like(IDS[:, :-3], -100), IDS[:, -3:]], 1)
    assert torch.isfinite(ours(**given, labels=whole).loss)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpt_tokens_type_mask": [1, 2]}, "cpt_tokens_type_mask has 2 entries, cpt_token_ids 10"),
        ({"cpt_mask": [1]}, "cpt_mask has 1 entries"),
        ({"task_type": "SEQ_CLS"}, "its loss is for CAUSAL_LM"),
        ({"opt_weighted_loss_type": "sum"}, "opt_weighted_loss_type"),
        ({"opt_projection_epsilon": -1}, "opt_projection_epsilon"),
        ({"cpt_token_ids": [-1]}, "cpt_token_ids"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(peftc.SpecError, match=said):
        spec(**fields)


def test_tokens_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(peftc.AdapterError, match="cpt_token_ids: 64, and the model embeds 64"):
        peftc.compile(tiny("llama"), spec(cpt_token_ids=[64], cpt_tokens_type_mask=[2]))
    with pytest.warns(UserWarning, match="cpt_mask has no effect"):
        spec(cpt_mask=[0] * 10)


def test_scripts_for_peft_run(tmp_path: Path) -> None:
    net = tiny("llama")
    config = served.CPTConfig(cpt_token_ids=EXAMPLES, cpt_tokens_type_mask=KINDS, task_type="CAUSAL_LM")
    model = served.get_peft_model(copy.deepcopy(net), config)
    assert config.num_virtual_tokens == 10
    assert isinstance(model.prompt_encoder["default"], served.CPTEmbedding)
    model(**inputs(OWN)).loss.backward()
    generated(model, IDS)
    model.save_pretrained(tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, net, str(tmp_path)).eval()
    near(again(**inputs()).loss, model.eval()(**inputs()).loss, 1e-5, "loss")
