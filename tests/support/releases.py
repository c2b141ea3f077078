"""The `adapter_config.json` of peft's releases: which fields each wrote first, and what adapters of its time set."""

from typing import Any

# What the first releases wrote.
OLDEST: dict[str, Any] = {
    "base_model_name_or_path": "facebook/opt-350m",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 4,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}
# By release: the fields it wrote first, and what an adapter of its time makes use of.
RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0.2": ({"enable_lora": None, "merge_weights": False}, {}),
    "0.3": ({"init_lora_weights": True}, {"target_modules": ["embed_tokens", "v_proj"]}),
    "0.5": (
        {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers", "task_type": None},
    ),
    "0.6": (
        {"alpha_pattern": {}, "rank_pattern": {}},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.*q_proj": 9}},
    ),
    "0.7": (
        {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
        {"target_modules": r".*\.(k|v)_proj", "init_lora_weights": "gaussian"},
    ),
    "0.8": ({"use_rslora": False}, {"use_rslora": True, "target_modules": "all-linear"}),
    "0.10": ({"layer_replication": None, "use_dora": False}, {"modules_to_save": ["norm", "lm_head"]}),
    "0.14": (
        {"eva_config": None, "exclude_modules": None, "lora_bias": False},
        {"exclude_modules": ["layers.1.self_attn.v_proj"], "eva_config": {"rho": 1.0, "tau": 0.9}},
    ),
    "0.15": ({"corda_config": None, "trainable_token_indices": None}, {"target_modules": ["lm_head", "embed_tokens"]}),
    "0.17": ({"qalora_group_size": 16, "target_parameters": None, "use_qalora": False}, {"layers_to_transform": 1}),
    "0.18": (
        {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"},
        {"init_lora_weights": "orthogonal"},
    ),
    "0.21": (
        {
            "kasa_config": None,
            "lora_ga_config": None,
            "monteclora_config": None,
            "use_bdlora": None,
            "velora_config": None,
        },
        {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"], "peft_version": "0.21.2"},
    ),
}
# Fields that were given up again.
_ENDED = {"0.3": ("enable_lora", "merge_weights")}


def config_of(release: str) -> dict[str, Any]:
    """The whole file as `release` wrote it."""
    written = dict(OLDEST)
    for name in list(RELEASES)[: list(RELEASES).index(release) + 1]:
        written = {key: value for key, value in written.items() if key not in _ENDED.get(name, ())}
        written |= RELEASES[name][0]
    return written | RELEASES[release][1]


_OLD_PROMPT: dict[str, Any] = {
    "base_model_name_or_path": "google/flan-t5-small",
    "inference_mode": True,
    "num_attention_heads": 4,
    "num_virtual_tokens": 4,
}
# Other methods in early releases: the model, the file, and the fields of today that give the same.
EARLY: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3 0.4": (
        "t5",
        {
            "auto_mapping": None,
            "base_model_name_or_path": "google/flan-t5-small",
            "fan_in_fan_out": False,
            "feedforward_modules": ["wo"],
            "inference_mode": True,
            "init_ia3_weights": True,
            "modules_to_save": None,
            "peft_type": "IA3",
            "revision": None,
            "target_modules": ["k", "v", "wo"],
            "task_type": "SEQ_2_SEQ_LM",
        },
    ),
    "PREFIX_TUNING 0.2": (
        "gpt2",
        {
            **_OLD_PROMPT,
            "encoder_hidden_size": 32,
            "num_layers": 2,
            "num_transformer_submodules": 1,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": True,
            "task_type": "CAUSAL_LM",
            "token_dim": 32,
        },
    ),
    "PROMPT_TUNING 0.3, from a text": (
        "t5",
        {
            **_OLD_PROMPT,
            "num_layers": 2,
            "num_transformer_submodules": 2,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "Classify the message.",
            "task_type": "SEQ_2_SEQ_LM",
            "token_dim": 32,
            "tokenizer_name_or_path": "google/flan-t5-small",
        },
    ),
}
# What would change the result, and peftc has not.
REFUSED: dict[str, Any] = {
    "megatron_config": {"hidden_size": 32},
    "arrow_config": {"top_k": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "init_lora_weights": "loftq",
}
