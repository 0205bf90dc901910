"""The linear layer that ``transformer_impl="local"`` lacks; needs torch alone."""

from __future__ import annotations

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
