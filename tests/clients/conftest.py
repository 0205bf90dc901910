import pytest


@pytest.fixture
def host_attention(world):
    """For tests of the host's own ``DSAttention``, which ours replaces before core 0.19."""
    import glm5_patch

    row = glm5_patch.require()["dsa_spec"]
    if row.state != "not_needed":
        pytest.skip(f"the plugin's attention is used here: {row.reason}")
