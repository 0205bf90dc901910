"""megatron-core's log of indexer losses, one slot a decoder layer, then one a depth of MTP.

megatron-core sums the log over the pipeline's ranks and skips a rank that logged nothing, so the
others wait for it forever. Every stage must therefore have a log of the same size, also one without
a computing layer.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossLoggingHelper,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from ..topk.tokens import token_group


def log_loss(
    config,
    loss: Tensor,
    layer_number: int,
    mtp_depth: int | None,
    shared_by: ProcessGroup | None,
    cp_group: ProcessGroup | None,
) -> None:
    """Add the indexer loss of one layer.

    Args:
        config: of the model.
        loss: [].
        layer_number: of a decoder layer.
        mtp_depth: of a layer of multi-token prediction, from 1.
        shared_by: the ranks that share the tokens out; their losses are added up.
        cp_group: the context-parallel ranks; the mean of their losses is logged.
    """
    slots = config.num_layers + (config.mtp_num_layers or 0)
    tracker = DSAIndexerLossLoggingHelper.tracker
    values = tracker.get("values")
    # A model that came before, or the host's own attention, may have made it smaller.
    if values is not None and len(values) < slots:
        tracker["values"] = torch.cat([values, values.new_zeros(slots - len(values))])
    DSAIndexerLossLoggingHelper.save_loss_to_tracker(
        loss=loss,
        layer_number=layer_number if mtp_depth is None else config.num_layers + mtp_depth,
        num_layers=slots,
        reduce_group=shared_by,
        avg_group=cp_group if config.context_parallel_size > 1 else None,
    )


def open_log(stack) -> None:
    """Have a log on this rank, also if no layer of the stack computes its top-k.

    Args:
        stack: what a pipeline stage has of the decoder, about to run.
    """
    config = stack.config
    if not (stack.training and torch.is_grad_enabled() and config.dsa_indexer_loss_coeff):
        return
    groups = getattr(stack, "pg_collection", None)
    groups = groups or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    log_loss(config, torch.zeros(()), 1, None, token_group(config, groups), groups.cp)
