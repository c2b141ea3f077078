"""What modules of one meaning are called in different architectures, to find the one that was meant."""

from collections.abc import Iterable, Mapping

# Names of one meaning, in a line.
_MEANINGS = (
    (
        "q_proj",
        "query",
        "q",
        "query_proj",
        "to_q",
        "q_lin",
        "wq",
        "q_attn",
        "query_key_value",
        "qkv",
        "qkv_proj",
        "c_attn",
    ),
    ("k_proj", "key", "k", "key_proj", "to_k", "k_lin", "wk", "query_key_value", "qkv", "qkv_proj", "c_attn"),
    ("v_proj", "value", "v", "value_proj", "to_v", "v_lin", "wv", "query_key_value", "qkv", "qkv_proj", "c_attn"),
    ("o_proj", "out_proj", "dense", "o", "to_out", "out_lin", "wo", "c_proj", "attn_out"),
    ("gate_proj", "w1", "gate_up_proj", "wi_0", "up_proj", "fc1"),
    ("up_proj", "w3", "gate_up_proj", "wi_1", "wi", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1"),
    ("down_proj", "w2", "wo", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "lin2"),
    ("lm_head", "embed_out", "output", "head"),
    ("classifier", "score", "classification_head", "head", "qa_outputs"),
    ("embed_tokens", "wte", "word_embeddings", "embeddings", "tok_embeddings", "shared"),
)
# What one linear for each expert was called, by the weight that stacks them now.
_STACKED: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3", "gate", "up"),
    "down_proj": ("down_proj", "w2", "down"),
}


def same_meaning(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that are called otherwise where `name` is used, in the order of likelihood."""
    groups = [group for group in _MEANINGS if name in group]
    have = set(known)
    return list(dict.fromkeys(other for group in groups for other in group if other in have))


def stacked_as(name: str, parameters: Iterable[str]) -> list[str]:
    """The parameters that hold, for all experts, what linears called `name` held for each."""
    wanted = {weight for weight, linears in _STACKED.items() if name in linears}
    return [fqn for fqn in parameters if fqn.rpartition(".")[2] in wanted]
