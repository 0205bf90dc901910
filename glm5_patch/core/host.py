"""The only place that looks at a host to learn what it can do. Shapes, never versions."""

from __future__ import annotations

import dataclasses
from types import ModuleType, SimpleNamespace
from typing import Any


def is_dsa(config: Any) -> bool:
    """Whether a Megatron configuration is of a model with DeepSeek sparse attention."""
    return getattr(config, "experimental_attention_variant", None) == "dsa"


def missing_fields(config_class: type, template: type) -> list[dataclasses.Field]:
    """The fields of the dataclass ``template`` that ``config_class`` does not have."""
    have = {field.name for field in dataclasses.fields(config_class)}
    return [field for field in dataclasses.fields(template) if field.name not in have]


class _ProbeNorm:
    """Stands for whatever norm a backend would use."""


class _ProbeLinear:
    """Stands for whatever linear layer a backend would use."""


class _ProbeFusedLinear:
    """Stands for a linear layer with the norm before it fused in."""


class _ProbeBackend:
    def layer_norm(self, rms_norm=False, for_qk=False, **_):
        return _ProbeNorm

    def column_parallel_layer_norm_linear(self):
        return _ProbeFusedLinear

    def linear(self):
        return _ProbeLinear

    column_parallel_linear = row_parallel_linear = linear


_PROBE_CONFIG = SimpleNamespace(
    experimental_attention_variant="dsa",
    multi_latent_attention=True,
    qk_l2_norm=False,
    qk_layernorm=True,
    normalization="RMSNorm",
    transformer_impl="transformer_engine",
)


def why_dsa_spec_is_wrong(module: ModuleType) -> str | None:
    """What the host's dispatcher makes of a GLM-5 layer, tried on stand-in modules.

    megatron-core 0.16 and 0.17 raise; 0.18 gives a spec whose latent norm is fused into the up
    projection, so the indexer sees the raw latent; 0.19's is right.
    """
    try:
        spec = module.get_experimental_attention_variant_module_spec(
            config=_PROBE_CONFIG, backend=_ProbeBackend()
        )
    except ValueError:
        return "the dispatcher raises ValueError for 'dsa'"
    if spec.submodules.q_layernorm is not _ProbeNorm:
        return "the indexer gets the query latent before its norm"
    if not shares_topk(module):
        return "the host's DSAttention has no index sharing"
    return None


def shares_topk(module: ModuleType) -> bool:
    """Whether the host's own DSAttention shares top-k between layers (megatron-core 0.19 on)."""
    return hasattr(module.DSAttention, "_get_index_share_topk_holder")


def why_backend_refuses_local(module: ModuleType) -> str | None:
    """Whether the block spec builder takes ``transformer_impl="local"``."""
    config = SimpleNamespace(transformer_impl="local", use_kitchen=False)
    try:
        backend = module._get_backend_spec_provider(config=config)
    except AssertionError:
        return "the block spec asserts transformer_impl == 'transformer_engine'"
    return None if hasattr(backend, "linear") else "LocalSpecProvider has no linear()"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine really imports, whatever the host's HAVE_TE flags say."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


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
