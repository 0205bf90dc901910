"""Low-rank adapters on every projection of an attention, split as the layers that they wrap."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

RANK = 3
OF_ATTENTION = (
    "linear_q_down_proj",
    "linear_kv_down_proj",
    "linear_q_up_proj",
    "linear_kv_up_proj",
    "linear_proj",
)
OF_INDEXER = ("linear_wq_b", "linear_wk", "linear_weights_proj")


class Adapter(torch.nn.Module):
    """A frozen linear layer, plus a product of two."""

    def __init__(self, wrapped, *, marks: bool = True):
        """Wrap a layer.

        Args:
            marks: whether what each rank has whole is marked for the host to add up; adapters on an
                indexer are the plugin's to mark.
        """
        super().__init__()
        self.to_wrap, self.split = wrapped, wrapped.config.sequence_parallel
        wrapped.weight.requires_grad_(False)
        out_features, in_features = wrapped.weight.shape
        self.down = torch.nn.Parameter(torch.empty(RANK, in_features))
        self.up = torch.nn.Parameter(torch.empty(out_features, RANK))
        whole = {ColumnParallelLinear: [self.down], RowParallelLinear: [self.up]}
        for parameter in whole.get(type(wrapped), [self.down, self.up]) if marks else ():
            parameter.sequence_parallel = self.split

    def forward(self, x):
        output, bias = self.to_wrap(x)
        if self.split and isinstance(self.to_wrap, ColumnParallelLinear):
            x = gather_from_sequence_parallel_region(x)
        low = x @ self.down.T
        if self.split and isinstance(self.to_wrap, RowParallelLinear):
            low = reduce_scatter_to_sequence_parallel_region(low)
        return output + low @ self.up.T, bias


def adapt(model) -> None:
    """Wrap the projections of every layer's attention, and of every indexer."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for name in OF_ATTENTION:
            setattr(attention, name, Adapter(getattr(attention, name)))
        indexer = attention.core_attention.indexer
        for name in OF_INDEXER if indexer is not None else ():
            setattr(indexer, name, Adapter(getattr(indexer, name), marks=False))
