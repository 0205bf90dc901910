"""Floating point operations of a GLM-5 training step, and the share of a GPU's peak that they are.

Counted are the products of matrices: three times those of a forward (a backward has twice as many),
without the recompute. Attention counts the keys that a query selects or sees, with absorbed
queries; the indexer counts in layers that compute their top-k, and its scores over all visible
keys. A multiplication and an addition are two.

No gradient goes to the scores of keys that are not selected, unless the indexer's loss is over all
keys. Of long sequences those are most of what is counted, so a rate is also given with the scores
counted once.
"""

from __future__ import annotations

import torch

from glm5_patch.config.huggingface import HFConfig

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}
"""Of dense bf16 products (NVIDIA's data sheets), by a part of the device's name; first found."""


def training_flops(config: HFConfig, length: int) -> float:
    """Of one sequence of ``length`` tokens."""
    selected = _pairs(length, config.index_topk)
    forward = length * config.hidden_size * config.vocab_size
    for layer in range(config.num_hidden_layers):
        forward += length * _projections(config) + selected * _core(config)
        if config.schedule.types[layer] == "full":
            forward += length * _indexer(config)
        forward += length * _feed_forward(config, layer)
    return 3 * (2 * float(forward) + index_scores_flops(config, length))


def index_scores_flops(config: HFConfig, length: int) -> float:
    """Of the index scores of one sequence, in a forward."""
    layers = config.schedule.types.count("full")
    of_a_pair = config.index_n_heads * config.index_head_dim
    return 2.0 * layers * _pairs(length, length) * of_a_pair


def rates(config: HFConfig, length: int, tokens_a_second: float) -> dict[str, float]:
    """TFLOP/s of one GPU, and of its peak where that is known.

    Args:
        config: of the model.
        length: tokens of a sequence.
        tokens_a_second: of one GPU.
    """
    every = training_flops(config, length)
    once = every - 2 * index_scores_flops(config, length)
    tflops, scores_once = (flop / length * tokens_a_second / 1e12 for flop in (every, once))
    found = {"TFLOP/s a GPU": round(tflops, 1), "scores counted once": round(scores_once, 1)}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return found if peak is None else {**found, "of peak": round(tflops / peak, 3)}


def _pairs(length: int, k: int) -> int:
    """Of a query and a key, where a query sees at most k."""
    short = min(length, k)
    return short * (short + 1) // 2 + (length - short) * k


def _projections(config: HFConfig) -> int:
    heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    down = hidden * (config.q_lora_rank + latent + rope)
    up = config.q_lora_rank * heads * (nope + rope)
    return down + up + heads * latent * (nope + value) + heads * value * hidden


def _core(config: HFConfig) -> int:
    """Of one query and one key: logits and values, of all heads."""
    return config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)


def _indexer(config: HFConfig) -> int:
    query = config.q_lora_rank * config.index_n_heads * config.index_head_dim
    return query + config.hidden_size * (config.index_head_dim + config.index_n_heads)


def _feed_forward(config: HFConfig, layer: int) -> int:
    if layer < config.first_k_dense_replace:
        return 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok + config.n_shared_experts
    router = config.hidden_size * config.n_routed_experts
    return router + 3 * config.hidden_size * config.moe_intermediate_size * experts
