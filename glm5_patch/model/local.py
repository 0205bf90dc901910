"""The host's local backend, with what a DSA model needs and it lacks."""

from __future__ import annotations

import torch
from megatron.core.models.backends import LocalSpecProvider

try:
    # MLA knows one class of linear layers with the whole weight on every rank, where it has any.
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.extensions.transformer_engine import TELinear as WholeLinear
except ImportError:
    from .duplicated_linear import DuplicatedLinear as WholeLinear


class LocalNorm:
    """torch's LayerNorm or RMSNorm; the host's wrapper of them refuses sequence parallelism."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma: torch's norms do not know it")
        norm_class = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = norm_class[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalDSASpecProvider(LocalSpecProvider):
    """The host's local backend, complete enough for a DSA model."""

    def linear(self) -> type:
        return WholeLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_) -> type:
        return LocalNorm
