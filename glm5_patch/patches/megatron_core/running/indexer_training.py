"""Training of the indexers in the host's loop: the phase, and the loss's weight and figures."""

from __future__ import annotations

import sys

from ....config.fields import NO_PHASE, PHASE, is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import scales_indexer_loss


class IndexerLossScale(Patch):
    id = "indexer_loss_scale"
    module = "megatron.core.pipeline_parallel.schedules"
    attribute = "forward_step_calc_loss"
    why = "The indexer loss is not averaged over microbatches and ranks as the main loss is."
    upstream = "megatron-core 0.19.0, except under context parallelism"
    remove_when = "the host's scale does not grow with the context-parallel size"

    def needed(self, module) -> Finding:
        if scales_indexer_loss(module):
            # Each rank's loss is a mean already, and data parallelism averages over the ranks.
            return Finding(True, "the scale is multiplied by the context-parallel size")
        return Finding(True, "the schedules set no scale for the indexer loss")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _calc_loss, reads=("config", "num_microbatches"))

    def guards(self, config) -> bool:
        return bool(config.dsa_indexer_loss_coeff)


def _calc_loss(wrapped, instance, args, kwargs):
    output_tensor, num_tokens = result = wrapped(*args, **kwargs)
    config = argument(wrapped, args, kwargs, "config")
    own_scale = getattr(config, "experimental_attention_variant_loss_scale_func", None)
    if is_glm5(config) and config.dsa_indexer_loss_coeff and own_scale is None:
        num_microbatches = argument(wrapped, args, kwargs, "num_microbatches")
        _set_scale(config, num_microbatches, output_tensor.device)
    return result


def _set_scale(config, num_microbatches: int, device) -> None:
    import torch
    from megatron.core.transformer.experimental_attention_variant.dsa import (
        DSAIndexerLossAutoScaler,
    )

    scale = torch.ones(1, device=device)
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    if not config.calculate_per_token_loss:
        scale = scale / num_microbatches
    DSAIndexerLossAutoScaler.set_loss_scale(scale.reshape(()))


class IndexerLossFigures(Patch):
    id = "indexer_loss_figures"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "DSAIndexerLossLoggingHelper.track_indexer_metrics"
    why = "The loggers get one mean over all layers, of which most have no indexer."
    upstream = "none: the host takes per_layer_logging and ignores it"
    remove_when = "the host logs the loss of each layer"

    def needed(self, module) -> Finding:
        return Finding(True, "the host logs no layer's own loss")

    def apply(self, module, seams) -> None:
        helper = module.DSAIndexerLossLoggingHelper
        reads = ("iteration", "writer", "wandb_writer")
        seams.wrap(helper, "track_indexer_metrics", _track, reads=reads)

    def guards(self, config) -> bool:
        return False  # without it figures are missing, and nothing is computed wrongly


def _track(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    if "glm5_patch.attention.loss_log" in sys.modules:  # else no model of ours has trained
        from ....training.figures import write_indexer_losses

        names = ("iteration", "writer", "wandb_writer")
        write_indexer_losses(*(argument(wrapped, args, kwargs, name) for name in names))
    return result


class TrainingPhase(Patch):
    id = "training_phase"
    module = "megatron.core.distributed.data_parallel_base"
    attribute = "_BaseDataParallel.__init__"
    why = "No flag freezes the trunk or the indexers before the gradient buffers are made."
    upstream = "none"
    remove_when = "never: it applies this package's dsa_training_phase"

    def needed(self, module) -> Finding:
        return Finding(True, "the host has no phases of sparse-attention training")

    def apply(self, module, seams) -> None:
        wrapper = module._BaseDataParallel
        seams.wrap(wrapper, "__init__", _with_phase, reads=("config", "module"))

    def guards(self, config) -> bool:
        return getattr(config, PHASE, NO_PHASE) != NO_PHASE


def _with_phase(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    phase = getattr(config, PHASE, NO_PHASE)
    if is_glm5(config) and phase != NO_PHASE:
        from ....training.phases import set_phase

        set_phase(argument(wrapped, args, kwargs, "module"), phase)
    return wrapped(*args, **kwargs)
