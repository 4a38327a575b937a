"""Tiny random models of common student families, each with the peculiarity of its head."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.making import VOCABULARY

PADDED = VOCABULARY + 6
"""Rows of their heads: more than the tokenizer has ids, as most published models have."""

_COMMON = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Wide enough that soft-capping and scales change the loss.
    "initializer_range": 0.3,
}
_GPT2 = {"vocab_size": PADDED, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
_SPECIAL = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "phi3": {},
    "gpt2": _GPT2,
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
}
FAMILIES = tuple(_SPECIAL)


def tiny(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model of `family`, without dropout, whose head has `PADDED` rows."""
    fields = _GPT2 if family == "gpt2" else {**_COMMON, **_SPECIAL[family]}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    given = {name: value for name, value in (fields | dropout).items() if value is not None}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given), dtype=torch.float32)


_EVERY = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
    "init_std": 0.3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "kv_channels": 16,
    "state_size": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "is_decoder": True,
}


def tiny_of(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model of any `model_type` with one configuration, small wherever its configuration has a usual name.

    In evaluation mode: some routers of experts add noise in training.
    """
    defaults = CONFIG_MAPPING[kind]()
    known = {*defaults.to_dict(), *defaults.attribute_map, "is_decoder"}
    fields = {name: value for name, value in _EVERY.items() if name in known} | changes
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields), dtype=dtype).eval()
