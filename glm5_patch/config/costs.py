"""Estimated forward FLOPs per token of the parts of a GLM-5, to balance stages and not for MFU."""

from __future__ import annotations

from dataclasses import dataclass

from .huggingface import HFConfig

LONGEST_OF_16_BITS = 1 << 16
"""Positions in documents of at most this many tokens take 16 bits each where they are sent."""


def position_bytes(longest_document: int) -> int:
    """Of one position of a top-k that crosses pipeline stages."""
    return 2 if longest_document <= LONGEST_OF_16_BITS else 4


def topk_bytes_per_token(index_topk: int, longest_document: int) -> int:
    """What a top-k adds to each token that crosses; 0 where every key is selected anyway."""
    if longest_document <= index_topk:
        return 0
    return index_topk * position_bytes(longest_document)


@dataclass(frozen=True)
class Costs:
    """FLOPs of one token's forward pass."""

    layers: tuple[float, ...]
    embedding: float
    output: float
    mtp: float
    """The multi-token-prediction layer with its projection and output layer."""


def estimate(hf: HFConfig, seq_length: int) -> Costs:
    """Multiply-adds count 2. Attention is absorbed and sparse; a computing layer also scores every
    visible key, half of ``seq_length`` on average."""
    h, heads = hf.hidden_size, hf.num_attention_heads
    latent = hf.kv_lora_rank + hf.qk_rope_head_dim
    qk_head_dim = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    projections = 2 * (
        h * hf.q_lora_rank
        + hf.q_lora_rank * heads * qk_head_dim
        + h * latent
        + hf.kv_lora_rank * heads * (hf.qk_nope_head_dim + hf.v_head_dim)
        + heads * hf.v_head_dim * h
    )
    visible = seq_length / 2
    attended = min(hf.index_topk, visible)
    attention = projections + 2 * heads * attended * (latent + hf.kv_lora_rank)
    index_width = hf.index_n_heads * hf.index_head_dim
    indexer = 2 * (
        hf.q_lora_rank * index_width
        + h * (hf.index_head_dim + hf.index_n_heads)
        + index_width * visible
    )
    dense = 6 * h * hf.intermediate_size
    experts = hf.num_experts_per_tok + hf.n_shared_experts
    moe = 6 * h * hf.moe_intermediate_size * experts + 2 * h * hf.n_routed_experts
    output = 2 * h * hf.vocab_size
    layers = tuple(
        attention + (moe if is_moe else dense) + (indexer if hf.schedule.computes(n) else 0)
        for n, is_moe in enumerate(hf.moe_layers, 1)
    )
    mtp = attention + indexer + moe + 4 * h * h + output
    return Costs(layers, embedding=0.0, output=output, mtp=mtp)
