import numpy
import pytest
import torch


@pytest.fixture
def interpreted(monkeypatch):
    """Triton computes on the CPU, where torch would without being asked. Its interpreter leaves
    products to numpy's BLAS, which may round a row otherwise in another place of a tile; in fp64
    that is too little to be seen."""
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter: a GPU gives fp32 to torch; test_registry has bf16")
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is missing")
    dot = interpreter.InterpreterBuilder.create_dot

    def in_fp64(builder, a, b, d, *how):
        if not a.data.dtype == b.data.dtype == d.data.dtype == numpy.float32:
            return dot(builder, a, b, d, *how)
        product = a.data.astype(numpy.float64) @ b.data.astype(numpy.float64) + d.data
        return interpreter.TensorHandle(product.astype(numpy.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_fp64)
