"""Tiny random models of every family, and complete checkpoint folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# 256 bytes, then the special tokens; the rest is never used.
VOCAB = 320
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_MHA = {"hidden_size": 64, "num_attention_heads": 4}
_GQA = {**_MHA, "num_key_value_heads": 2}
_LLAMA = {**_GQA, "intermediate_size": 96}
# Heads wider than hidden_size / heads: attention's inner width then differs from the residual's.
_WIDE = {**_LLAMA, "head_dim": 32}
_GEMMA = {**_WIDE, "query_pre_attn_scalar": 32, "sliding_window": 16}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "num_hidden_layers": 3},
    "mistral": {**_LLAMA, "head_dim": 16, "sliding_window": 16},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_WIDE, "tie_word_embeddings": True},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "opt": {**_MHA, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_inner": 96},
    "gpt_neox": {**_MHA, "intermediate_size": 96},
    "phi3": _LLAMA,
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_WIDE,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
FAMILIES = tuple(_CONFIGS)


def tiny(family: str, **overrides: Any) -> tuple[Any, Any]:
    """Build (config, model): float32, evaluation mode, the same weights at every call.

    Norm weights lie in [0.5, 1.5] (around what the norm multiplies by) and biases are not zero,
    so that mistakes about them show.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **_CONFIGS[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:
                centre = 0.0 if family.startswith("gemma") else 1.0
                parameter.uniform_(centre - 0.5, centre + 0.5, generator=generator)
    return config, model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *SPECIAL.values()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def save_tiny(
    family: str, path: Path | str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write the model, its config and a tokenizer as a checkpoint folder; return the folder."""
    _, model = tiny(family, **overrides)
    model.to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)
