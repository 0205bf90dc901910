"""Sparse attention over the key-value latent of multi-latent attention."""

from __future__ import annotations

from torch import Tensor

from ..fallback import compute
from .inputs import AttentionInputs


def sparse_attention(attention: AttentionInputs) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each query over the keys that its top-k names.

    A query's output has the same bits whatever else is in the batch. So no query is computed by
    dense attention: its kernels choose how to add up by the number of queries.

    Returns:
        [s, b, n * value], of the query's dtype, zeros for a query without any key; and
        ``AttentionInputs.lse``, without a gradient, where the backend finds it.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for a backend that can't compute it.
    """
    return compute("sparse_attention", attention.call, attention)
