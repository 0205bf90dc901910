"""Logs of indexer losses, one slot a decoder layer, then one a depth of MTP.

There are two. megatron-core's own has the mean of all layers, computing or not. It sums its log
over the pipeline's ranks and skips a rank that logged nothing, so the others wait for it forever.
Every stage must therefore have a log of the same size, also one without a computing layer. The one
of this package has each layer's loss, and counts the microbatches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossLoggingHelper,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from ..config.schedule import IndexSchedule
from ..topk.tokens import token_group


@dataclass
class SlotSums:
    """Sums of figures by layer, of this rank, until they are taken."""

    sums: Tensor | None = None
    """fp32 [figures, slots]."""
    groups: tuple[ProcessGroup | None, ...] = ()
    """The ranks that have other layers, tokens or batches."""
    names: tuple[str, ...] = ()
    """Of the slots."""

    def of(self, config, figures: int, groups: tuple[ProcessGroup | None, ...], device) -> Tensor:
        """The sums, of a model whose layers may be more than those of the model before.

        Args:
            config: of the model.
            figures: how many there are of a layer.
            groups: see ``groups``.
            device: of the sums.
        """
        names = slot_names(config)
        if self.names != names or self.sums is None:
            self.names = names
            self.sums = torch.zeros(figures, len(names), device=device)
        self.groups = groups
        return self.sums

    def take(self) -> Tensor | None:
        """The sums over all ranks, and begin anew; None if there are none. Every rank that has any
        must call it."""
        sums, self.sums = self.sums, None
        if sums is None:
            return None
        data = parallel_state.get_data_parallel_group(with_context_parallel=False)
        for group in (*self.groups, parallel_state.get_pipeline_model_parallel_group(), data):
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(sums, group=group)
        return sums


LOSSES = SlotSums()
"""Losses and microbatches of the training steps of this process."""


def slot_names(config) -> tuple[str, ...]:
    """``layer_07`` of a decoder layer, by its number in a GPTModel, and ``mtp_1``; empty where a
    layer of a HybridModel has no attention."""
    return _names(IndexSchedule.from_megatron(config), config.mtp_num_layers or 0)


@functools.cache
def _names(schedule: IndexSchedule, depths: int) -> tuple[str, ...]:
    """Every computing layer asks for them in every microbatch."""
    decoder = (
        f"layer_{schedule.attention_number(n):02d}" if schedule.has_attention(n) else ""
        for n in range(1, schedule.num_layers + 1)
    )
    return (*decoder, *(f"mtp_{depth}" for depth in range(1, depths + 1)))


def slot_of(config, layer_number: int, mtp_depth: int | None) -> int:
    """The slot of a layer, from 0; a repeated MTP layer has the first one."""
    return (layer_number if mtp_depth is None else config.num_layers + mtp_depth) - 1


def log_loss(
    config,
    loss: Tensor,
    layer_number: int,
    mtp_depth: int | None,
    shared_by: ProcessGroup | None,
    cp_group: ProcessGroup | None,
    queries: float = 0.0,
) -> None:
    """Add the indexer loss of one layer.

    Args:
        config: of the model.
        loss: [].
        layer_number: of a decoder layer.
        mtp_depth: of a layer of multi-token prediction, from 1.
        shared_by: the ranks that share the tokens out; their losses are added up.
        cp_group: the context-parallel ranks; the mean of their losses is logged.
        queries: of the microbatch, over which the loss is a mean, or with
            ``calculate_per_token_loss`` a sum; 0: no layer ran.
    """
    slot = slot_of(config, layer_number, mtp_depth)
    slots = config.num_layers + (config.mtp_num_layers or 0)
    tracker = DSAIndexerLossLoggingHelper.tracker
    values = tracker.get("values")
    # A model that came before, or the host's own attention, may have made it smaller.
    if values is not None and len(values) < slots:
        tracker["values"] = torch.cat([values, values.new_zeros(slots - len(values))])
    cp_group = cp_group if config.context_parallel_size > 1 else None
    DSAIndexerLossLoggingHelper.save_loss_to_tracker(
        loss=loss,
        layer_number=slot + 1,
        num_layers=slots,
        reduce_group=shared_by,
        avg_group=cp_group,
    )
    sums = LOSSES.of(config, 2, (shared_by, cp_group), tracker["values"].device)
    if queries:
        # A sum over all ranks of a mean's parts: the count of this rank is its part as well.
        loss = loss.detach()
        sums[0, slot].add_(loss / queries if config.calculate_per_token_loss else loss)
        sums[1, slot].add_(1 / (1 if shared_by is None else shared_by.size()))


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
