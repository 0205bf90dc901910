"""The small random GLM-5 that is given to an implementation, in Hugging Face's format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

LENGTH = 30
"""Tokens of a sequence; the first ``index_topk`` of them attend to everything before them."""
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    moe_intermediate_size=72,
    num_hidden_layers=6,
    first_k_dense_replace=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    n_shared_experts=2,
    n_routed_experts=10,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
    q_lora_rank=48,
    kv_lora_rank=56,
    qk_nope_head_dim=28,
    qk_rope_head_dim=16,
    qk_head_dim=44,
    v_head_dim=80,
    head_dim=28,
    index_topk=9,
    index_head_dim=32,
    index_n_heads=8,
    rms_norm_eps=3e-5,
)
"""Each differs from the others and from every library's default, so that a setting that is dropped,
or taken for its neighbour, shows. Only ``head_dim`` is ``qk_nope_head_dim``, as in GLM-5.2's
config.json."""
FLAVOURS = {
    "5.2": dict(rope_theta=8e6, index_topk_freq=2, index_skip_topk_offset=3),
    "5.1": dict(rope_theta=1e6, index_topk_freq=1, index_skip_topk_offset=3),
}
SCALES = {
    "embed_tokens.weight": 0.003,
    "q_a_proj.weight": 0.002,
    "kv_a_proj_with_mqa.weight": 0.002,
    "indexer.wk.weight": 0.001,
}
"""What goes into a norm is small, or the epsilon of the norm does not show."""


def computing_layers(layers: int, freq: int, offset: int) -> tuple[int, ...]:
    """Numbers, from 1, of the layers that run their indexer."""
    return tuple(n for n in range(1, layers + 1) if max(n - offset, 0) % freq == 0)


def make_config(flavour: str = "5.2") -> SimpleNamespace:
    """The fields of the config.json.

    Args:
        flavour: "5.2", or "5.1", in which every layer computes its top-k.
    """
    own = FLAVOURS[flavour]
    layers, dense = SIZES["num_hidden_layers"], SIZES["first_k_dense_replace"]
    freq, offset = own["index_topk_freq"], own["index_skip_topk_offset"]
    computing = computing_layers(layers, freq, offset)
    return SimpleNamespace(
        architectures=["GlmMoeDsaForCausalLM"],
        model_type="glm_moe_dsa",
        dtype="float32",
        **SIZES,
        hidden_act="silu",
        initializer_range=0.02,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        attention_bias=False,
        attention_dropout=0.0,
        use_cache=True,
        rope_parameters={"rope_theta": own["rope_theta"], "rope_type": "default"},
        rope_interleave=True,
        indexer_rope_interleave=True,
        index_topk_freq=freq,
        index_skip_topk_offset=offset,
        index_topk_pattern=None,
        indexer_types=["full" if n in computing else "shared" for n in range(1, layers + 1)],
        moe_layer_freq=1,
        mlp_layer_types=["dense"] * dense + ["sparse"] * (layers - dense),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )


def make_weights(
    config: SimpleNamespace, seed: int, all_indexers: bool = False
) -> dict[str, Tensor]:
    """Published name -> fp32 tensor.

    Args:
        config: made by ``make_config``.
        seed: of the values. A tensor has the same values with and without ``all_indexers``.
        all_indexers: give skip layers an indexer too. No GLM-5 has one there; a model that runs
            the wrong layers' indexers then finds weights.
    """
    c = config
    heads, index_width = c.num_attention_heads, c.index_n_heads * c.index_head_dim

    def mlp(width: int) -> dict[str, tuple[int, ...]]:
        return {
            "gate_proj.weight": (width, c.hidden_size),
            "up_proj.weight": (width, c.hidden_size),
            "down_proj.weight": (c.hidden_size, width),
        }

    attention = {
        "q_a_proj.weight": (c.q_lora_rank, c.hidden_size),
        "q_a_layernorm.weight": (c.q_lora_rank,),
        "q_b_proj.weight": (heads * c.qk_head_dim, c.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, heads * c.v_head_dim),
    }
    indexer = {
        "indexer.wq_b.weight": (index_width, c.q_lora_rank),
        "indexer.wk.weight": (c.index_head_dim, c.hidden_size),
        "indexer.k_norm.weight": (c.index_head_dim,),
        "indexer.k_norm.bias": (c.index_head_dim,),
        "indexer.weights_proj.weight": (c.index_n_heads, c.hidden_size),
    }
    moe = {
        "gate.weight": (c.n_routed_experts, c.hidden_size),
        "gate.e_score_correction_bias": (c.n_routed_experts,),
    }
    for number in range(c.n_routed_experts):
        moe |= {f"experts.{number}.{k}": s for k, s in mlp(c.moe_intermediate_size).items()}
    shared = mlp(c.n_shared_experts * c.moe_intermediate_size)
    moe |= {f"shared_experts.{name}": shape for name, shape in shared.items()}

    shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
        "lm_head.weight": (c.vocab_size, c.hidden_size),
    }
    for layer in range(c.num_hidden_layers):
        dense = c.mlp_layer_types[layer] == "dense"
        parts = {"input_layernorm.weight": (c.hidden_size,)}
        parts |= {f"self_attn.{name}": shape for name, shape in (attention | indexer).items()}
        parts["post_attention_layernorm.weight"] = (c.hidden_size,)
        parts |= {f"mlp.{k}": s for k, s in (mlp(c.intermediate_size) if dense else moe).items()}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}

    generator = torch.Generator().manual_seed(seed)
    weights = {name: _values(name, shape, generator) for name, shape in shapes.items()}
    if all_indexers:
        return weights
    skip = [n for n, kind in enumerate(c.indexer_types) if kind == "shared"]
    without = tuple(f"model.layers.{layer}.self_attn.indexer." for layer in skip)
    return {name: value for name, value in weights.items() if not name.startswith(without)}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.1 * values
    if name.endswith("k_norm.bias"):
        return 0.5 * values
    if len(shape) == 1:
        return 1 + 0.3 * values
    scale = next((s for end, s in SCALES.items() if name.endswith(end)), shape[-1] ** -0.5)
    return scale * values


def save(directory: Path, config: SimpleNamespace, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def make_tokens(config: SimpleNamespace, seed: int, batch: int, length: int) -> Tensor:
    """int64 [b, s]. No token occurs twice in a sequence: its keys would be equal without a rope,
    and the choice among equals says nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(config.vocab_size, generator=generator) for _ in range(batch)]
    return torch.stack(rows)[:, :length]
