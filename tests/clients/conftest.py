import pytest


@pytest.fixture
def host_attention(world, monkeypatch):
    """Models of the host's own ``DSAttention``, where it shares top-k (megatron-core 0.19 on)."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    if not hasattr(DSAttention, "_get_index_share_topk_holder"):
        pytest.skip("this megatron-core's DSAttention has no index sharing")
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "host")
