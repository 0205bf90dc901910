import pytest
import torch


@pytest.fixture
def interpreted(monkeypatch):
    """Triton computes on the CPU, where torch would without being asked."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter: a GPU gives fp32 to torch; test_registry has bf16")
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
