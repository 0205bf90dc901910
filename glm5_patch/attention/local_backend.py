"""The host's local backend, with what a DSA model needs and it lacks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class DuplicatedLinear(torch.nn.Module):
    """A linear layer with the whole weight on every tensor-parallel rank.

    Stands where the host's Transformer Engine backend puts ``TELinear`` in duplicated mode, with
    its constructor, so a checkpoint sees one replicated ``weight`` [output_size, input_size].
    """

    tensor_model_parallel = False
    """Megatron-Bridge asks for it, and for the config."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config,
        init_method,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool,
        parallel_mode: str,
        **_,
    ) -> None:
        super().__init__()
        self.config = config
        if bias or skip_bias_add or skip_weight_param_allocation or parallel_mode != "duplicated":
            raise ValueError(
                f"DuplicatedLinear knows no bias and only parallel_mode='duplicated', got "
                f"bias={bias}, parallel_mode={parallel_mode!r}"
            )
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, device=device, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            init_method(self.weight)
        # Each rank sees its part of the sequence, and the host sums what is marked so.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> [..., output_size], and the bias that there is not."""
        return torch.nn.functional.linear(x, self.weight), None


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


@functools.cache
def local_spec_provider():
    """The host's local backend, complete enough for a DSA model."""
    # Here: import hooks of the host need DuplicatedLinear, and may not import more of the host.
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import multi_latent_attention as mla

    class LocalDSASpecProvider(LocalSpecProvider):
        def linear(self) -> type:
            return mla.TELinear  # the class that MLA takes as a down projection

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_) -> type:
            return LocalNorm

    return LocalDSASpecProvider()
