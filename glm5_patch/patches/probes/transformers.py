"""What a transformers release can do: shapes, never versions."""

from __future__ import annotations

_PROBE_HF_CONFIG = {
    # GLM-5.2's config.json in miniature; head_dim is as published and none of its head sizes.
    "num_hidden_layers": 8,
    "head_dim": 48,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_rope_interleave": True,
    "layer_types": ["indexed_attention"] * 8,
}


def what_hf_config_spoils(config_class: type) -> list[str]:
    """Which values of a config.json a transformers release changes when it parses it."""
    try:
        config = config_class(**_PROBE_HF_CONFIG)
    except Exception as error:  # layer_types that this release does not know
        return [f"config.json is refused: {type(error).__name__}"]
    expected = {
        "qk_rope_head_dim": 16,
        "qk_head_dim": 64,
        "head_dim": 16,
        "n_routed_experts": 8,
        "indexer_types": [*["full"] * 3, *["shared"] * 3, "full", "shared"],
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "indexer_rope_interleave": True,
    }
    if hasattr(config, "num_experts"):  # readers that find it prefer it to n_routed_experts
        expected["num_experts"] = 8
    found = {name: getattr(config, name, "lost") for name in expected}
    return [f"{name} is {found[name]}" for name in expected if found[name] != expected[name]]
