"""Tiny random models of many model families of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Of a byte-level text model of 4 layers; a configuration keeps the settings that its family does not know as extras.
_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_LATENT: dict[str, Any] = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "intermediate_size": [64, 64, 48, 48],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": _GPT,
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "codegen": {**_GPT, "rotary_dim": 4},
    "openai-gpt": _GPT,
    "ctrl": {"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 64},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"head_dim": None},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "cohere2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "glm": {},
    "glm4": {},
    "exaone4": {},
    "nemotron": {},
    "persimmon": {},
    "smollm3": {},
    "helium": {},
    "biogpt": {},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4},
    "arcee": {},
    "apertus": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "diffllama": {},
    "doge": {},
    "bitnet": {},
    "minicpm3": _LATENT,
    "modernbert-decoder": {"bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
    "bert": {"is_decoder": True},
    "big_bird": {"is_decoder": True},
    "trocr": {"d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "gpt_neox_japanese": {},
    "nanochat": {},
    "vaultgemma": {},
    "hrm_text": {},
    "mixtral": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "deepseek_v3": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_oss": _EXPERTS,
    "phimoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "jetmoe": _EXPERTS,
    "glm4_moe": {**_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 64},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_d_state": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, **_MAMBA, "mamba_d_state": 8, "num_mem_blocks": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8},
    "granitemoehybrid": {
        **_EXPERTS,
        **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 16,
    },
    "qwen3_next": {
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
    },
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "lfm2": {},
    "minimax": _EXPERTS,
    "olmo_hybrid": {},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "llava": {"vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_id": 250},
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **_VISION}, "mm_tokens_per_image": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4},
}
_WITH_IMAGES = {"llava": "llama", "gemma3": "gemma3_text"}
_CLASSES = {"llava": "LlavaForConditionalGeneration", "t5": "T5ForConditionalGeneration"}


class ByteLevelTokenizer(PreTrainedTokenizerFast):
    """A tokenizer with one token per byte and no special tokens."""

    def __init__(self, **_: Any) -> None:  # noqa: ANN401
        vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        super().__init__(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def tiny_model(family: str) -> Any:  # noqa: ANN401
    """Makes a tiny random model.

    Args:
        family: A key of ``FAMILIES``: transformers' ``model_type``.

    Returns:
        A causal language model with a vocabulary of 256 tokens and random biases and norms, in evaluation mode.
    """
    settings: dict[str, Any] = {**_TEXT, **FAMILIES[family]}
    if family in _WITH_IMAGES:
        text = {"model_type": _WITH_IMAGES[family], **_TEXT}
        settings = {"text_config": text, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **{name: value for name, value in settings.items() if value is not None})
    for name in ("bos_token_id", "eos_token_id"):
        if name in settings and settings[name] is None:
            setattr(config, name, None)
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = getattr(transformers, _CLASSES[family])(config) if family in _CLASSES else auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases, norms and scales, which may start as zeros or ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
