"""Trainable tokens: which rows of which embeddings."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from peftc.specs import AdapterSpec
from peftc.specs.base import plain


def _named_once(value: Any) -> Any:
    tokens = tuple(value) if isinstance(value, list) else value
    twice = next((token for token in tokens if tokens.count(token) > 1), None) if isinstance(tokens, tuple) else None
    if twice is not None:
        raise ValueError(f"token {twice!r} is named twice, and only one of its rows could count")
    return tokens


Tokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_named_once)]


class TrainableTokensConfig(AdapterSpec):
    """Trains the rows of the tokens `token_indices`: by default those of the model's input embedding.

    Ends of a tie follow the input embedding, and have the very same rows; other targets have rows of their own. A linear
    that is named (a head) has a token's row in its weight. `init_weights=False`: rows start random, which changes the
    model. Of several active adapters that train a token, the last loaded has it.

    Example: TrainableTokensConfig(token_indices=tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    """

    on_embedding: ClassVar[bool] = True

    peft_type: Literal["TRAINABLE_TOKENS"] = "TRAINABLE_TOKENS"
    token_indices: Tokens = ()
    init_weights: bool = True

    def to_dict(self) -> dict[str, Any]:
        # Fields that PEFT's class has not, and warns of, if they say nothing.
        unknown = {field for field in ("exclude_modules", "modules_to_save") if getattr(self, field) is None}
        return plain(self.model_dump(exclude=unknown))


class _Beside(TrainableTokensConfig):
    """The same as a part of another method's adapter. `strictly`: an end of a tie that can't follow is an error."""

    kept_in: ClassVar[str | None] = "token_adapter"

    strictly: bool = False

    @property
    def ties_bind(self) -> bool:
        return self.strictly


class TokensBeside(AdapterSpec):
    """A spec of another method whose adapters can train rows of tokens too.

    `trainable_token_indices`: tokens of the input embedding, or by the name of a module (`{"embed_tokens": [1, 2]}`).
    `ensure_weight_tying`: other tokens for another end of a tie are an error, and targets and saved modules that are ends
    of the input embedding's tie have the very same tensors at all of them.
    """

    trainable_token_indices: Tokens | dict[str, Tokens] | None = None
    ensure_weight_tying: bool = False

    @property
    def ties_targets(self) -> bool:
        return self.ensure_weight_tying

    def renamed(self, rename: Callable[[str], str]) -> Self:
        asked = self.trainable_token_indices
        if not isinstance(asked, dict):
            return self
        update = {"trainable_token_indices": {rename(name): tokens for name, tokens in asked.items()}}
        return self.model_copy(update=update)

    def companions(self) -> Mapping[str, tuple[AdapterSpec, ...]]:
        asked, strictly = self.trainable_token_indices, self.ensure_weight_tying
        if asked is None:
            return {}
        # Modules with the same tokens go together: they have the same rows, if they are tied.
        groups: dict[Tokens, tuple[str, ...] | None] = {}
        for name, tokens in asked.items() if isinstance(asked, dict) else ():
            groups[tokens] = (*(groups.get(tokens) or ()), name)
        own = groups.items() if isinstance(asked, dict) else [(asked, None)]
        made = (_Beside(token_indices=tokens, target_modules=names, strictly=strictly) for tokens, names in own)
        return {"trainable_token_indices": tuple(made)}
