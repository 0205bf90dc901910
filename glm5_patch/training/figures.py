"""Figures of the indexers while a model trains: losses, which keys they select, what those hold.

Megatron-LM writes the losses by itself (patch ``indexer_loss_figures``). Megatron-Bridge takes an
``IndexerCallback``, and a loop of one's own calls ``indexer_losses`` and ``SelectionProbe.measure``
on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from ..attention.attention import CrossLayerDSAttention
from ..attention.loss_log import LOSSES, SlotSums, slot_of
from ..errors import GLM5PatchError
from ..ops.index_loss.reference import attention_mass
from ..ops.query_positions import common_keys
from ..ops.sparse_attention.inputs import AttentionInputs
from ..topk.tokens import token_group

PREFIX = "glm5"


def indexer_losses() -> dict[str, float]:
    """The indexer losses since the last call, by ``glm5/indexer_loss/layer_07`` or ``.../mtp_1``.

    Each is the mean over the microbatches and over the ranks of context and data parallelism, times
    ``dsa_indexer_loss_coeff``, of the decoder layers and MTP layers of all pipeline stages. Every
    rank must call it, and has the same result. Megatron-LM calls it in each step.

    Returns:
        Nothing where no indexer has trained since.
    """
    sums = LOSSES.take()
    return {} if sums is None else _named(("indexer_loss",), sums[:1], sums[1], LOSSES.names)


def write_indexer_losses(step: int, writer: Any, wandb_writer: Any) -> None:
    """Write what ``indexer_losses`` returns. On a rank without a logger the host does not wait for
    the device."""
    if writer is None and wandb_writer is None:
        LOSSES.take()
    else:
        write_figures(indexer_losses(), step, writer, wandb_writer)


def write_figures(
    figures: Mapping[str, float], step: int, writer: Any = None, wandb_writer: Any = None
) -> None:
    """Write figures to the loggers of a host.

    Args:
        figures: by name.
        step: the iteration.
        writer: a TensorBoard ``SummaryWriter``; None on ranks without one.
        wandb_writer: the module ``wandb`` or a run of it, likewise.
    """
    if writer is not None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
    if wandb_writer is not None and figures:
        wandb_writer.log(dict(figures), step)


class SelectionProbe:
    """What a model selects on one batch, while it trains.

    - ``glm5/topk_overlap/layer_07``: the share of the keys that its indexer selected in the first
      measurement and selects again, of computing layers.
    - ``glm5/attention_kept/layer_07``: the share of the attention over all visible keys, mean of
      the heads, that is on the selected ones, of every layer.
    - ``glm5/oracle_gap/layer_07``: how much more the same number of keys could hold.
    """

    def __init__(
        self, model: torch.nn.Module | Sequence[torch.nn.Module], forward: Callable[[], Any]
    ) -> None:
        """Measure nothing yet.

        Args:
            model: a Megatron model of this package's attention, or its chunks.
            forward: runs the model on the batch, by the pipeline's schedule where there is one. The
                same tokens each time, in any number of microbatches.
        """
        self._chunks = list(model) if isinstance(model, Sequence) else [model]
        self._forward = forward
        self._before: list[Tensor] | None = None

    def measure(self) -> dict[str, float]:
        """Run the batch, without gradients and in evaluation mode. Every rank must call it, and has
        the same result.

        Raises:
            GLM5PatchError: the model has none of this package's attention, or the batch is another
                than in the first measurement.
        """
        config = self._chunks[0].config
        slots, sums = _slots(config)
        found: list[Tensor] = []

        def look(core: CrossLayerDSAttention, attention: AttentionInputs) -> None:
            slot = slot_of(config, core.layer_number, core.topk_source.mtp_depth)
            kept, best = attention_mass(attention, core.head_group)
            sums[0, slot] += kept.sum()
            sums[1, slot] += (best - kept).sum()
            sums[2, slot] += kept.numel()
            if core.indexer is None:
                return
            topk_indices = attention.with_topk().topk_indices
            found.append(topk_indices.cpu())
            if self._before is not None:
                sums[3:, slot] += torch.stack(common_keys(topk_indices, self._earlier(found)))

        with self._observed(look), torch.no_grad():
            self._forward()
        if self._before is None:
            self._before = found
        return _selection_figures(slots)

    def _earlier(self, found: list[Tensor]) -> Tensor:
        """What was selected in the first measurement where the last of these was now."""
        place, now = len(found) - 1, found[-1]
        if place >= len(self._before) or self._before[place].shape[:2] != now.shape[:2]:
            raise GLM5PatchError(
                "SelectionProbe: the batch is not that of the first measurement; forward must run "
                "the same tokens each time"
            )
        return self._before[place].to(now.device)

    @contextmanager
    def _observed(self, look: Callable[[CrossLayerDSAttention, AttentionInputs], None]):
        modules = [module for chunk in self._chunks for module in chunk.modules()]
        cores = [module for module in modules if isinstance(module, CrossLayerDSAttention)]
        if not cores and parallel_state.get_pipeline_model_parallel_world_size() == 1:
            raise GLM5PatchError(
                "SelectionProbe: the model has no layer of this package's sparse attention; build "
                "it with GLM5_PATCH_ATTENTION=plugin"
            )
        with ExitStack() as undo:
            for module in modules:
                undo.callback(setattr, module, "training", module.training)
            for chunk in self._chunks:
                chunk.eval()
            for core in cores:
                core.attention_observer = functools.partial(look, core)
                undo.callback(delattr, core, "attention_observer")
            yield


class IndexerCallback:
    """Writes the figures after each training step of Megatron-Bridge::

    pretrain(config, forward_step, callbacks=[IndexerCallback()])
    """

    def __init__(self, probe: SelectionProbe | None = None, probe_interval: int = 100) -> None:
        """Write the losses of the indexers.

        Args:
            probe: write what it measures as well.
            probe_interval: so many steps apart.

        Raises:
            ValueError: the interval is not positive.
        """
        if probe_interval < 1:
            raise ValueError(f"probe_interval={probe_interval} must be at least 1")
        self._probe, self._interval = probe, probe_interval

    def on_train_step_end(self, context: Any) -> None:
        """Called by Bridge.

        Args:
            context: its ``CallbackContext``.
        """
        state = context.state
        step = state.train_state.step + 1  # as Bridge's own figures of this step
        figures = indexer_losses()
        if self._probe is not None and step % self._interval == 0:
            figures |= self._probe.measure()
        write_figures(figures, step, state.tensorboard_logger, state.wandb_logger)


def _named(
    kinds: Sequence[str], rows: Tensor, counts: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Means by name, of the slots that have any.

    Args:
        kinds: of the rows.
        rows: sums, [kinds, slots].
        counts: of what was added up, [slots].
        names: of the slots.
    """
    means, counts = (rows / counts).tolist(), counts.tolist()
    return {
        f"{PREFIX}/{kind}/{name}": mean
        for kind, row in zip(kinds, means)
        for name, mean, count in zip(names, row, counts)
        if count
    }


def _slots(config) -> tuple[SlotSums, Tensor]:
    """Sums for a measurement of a model."""
    cp_group = None
    if config.context_parallel_size > 1:
        cp_group = parallel_state.get_context_parallel_group()
    slots = SlotSums()
    sums = slots.of(config, 5, (token_group(config, None), cp_group), torch.cuda.current_device())
    return slots, sums


def _selection_figures(slots: SlotSums) -> dict[str, float]:
    kept, gap, queries, same, before = slots.take()
    masses = _named(
        ("attention_kept", "oracle_gap"), torch.stack([kept, gap]), queries, slots.names
    )
    return {**_named(("topk_overlap",), same[None], before, slots.names), **masses}
