"""A tokenizer of 64 made-up words, for models of 64 tokens."""

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def word_tokenizer(chat: bool = False) -> Any:
    """`w5 w6` are the tokens 5 and 6; in its form for chats a turn is between `w8` and `w9`."""
    made = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3")
    if chat:
        fast.chat_template = "{% for turn in messages %}w8 {{ turn['content'] | trim }} w9 {% endfor %}"
    return fast
