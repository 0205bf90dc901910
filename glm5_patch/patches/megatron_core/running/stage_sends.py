"""``P2PCommunicator``: stages tell each other the shape of what they send, and an output lives as
long as its send."""

from __future__ import annotations

import copy

from ....config.fields import ACROSS_STAGES, is_glm5
from ....patching.patch import Finding, Patch, argument, with_argument
from ...probes.megatron_core import frees_what_it_sends


class StageShapes(Patch):
    id = "stage_shapes"
    module = "megatron.core.pipeline_parallel.p2p_communication"
    attribute = "P2PCommunicator.__init__"
    why = "A stage that starts on a skip layer receives more columns than the host expects."
    upstream = "none: the host exchanges shapes only with variable_seq_lengths=True"
    remove_when = "the host sends a top-k between stages"

    def needed(self, module) -> Finding:
        return Finding(True, "stages expect [s, b, h] of each other")

    def apply(self, module, seams) -> None:
        seams.wrap(module.P2PCommunicator, "__init__", _init, reads=("config",))

    def guards(self, config) -> bool:
        return config.pipeline_model_parallel_size > 1 and getattr(config, ACROSS_STAGES, False)


def _init(wrapped, instance, args, kwargs):
    """The communicator alone sees ``variable_seq_lengths=True``: MoE dispatchers refuse it, and
    the schedules work out fixed shapes without it."""
    wrapped(*args, **kwargs)
    config = instance.config
    if not is_glm5(config) or not getattr(config, ACROSS_STAGES, False):
        return
    if not config.variable_seq_lengths:
        instance.config = copy.copy(config)
        instance.config.variable_seq_lengths = True


class PipelineSends(Patch):
    id = "pipeline_sends"
    module = "megatron.core.pipeline_parallel.schedules"
    attribute = "P2PCommunicator.send_forward_recv_forward"
    why = "With overlap_p2p_comm a stage's output is freed, and overwritten, while it is sent."
    upstream = "megatron-core 0.18 waits for the send before it frees (#4047)"
    remove_when = "no supported megatron-core is older than 0.18"

    def needed(self, module) -> Finding:
        if frees_what_it_sends(module):
            return Finding(True, "the interleaved schedule frees outputs that it still sends")
        return Finding(False, "the interleaved schedule waits for a send before it frees")

    def apply(self, module, seams) -> None:
        seams.wrap(
            module.P2PCommunicator,
            "send_forward_recv_forward",
            _send,
            reads=("output_tensor",),
        )

    def guards(self, config) -> bool:
        frees = config.deallocate_pipeline_outputs and config.overlap_p2p_comm
        return config.pipeline_model_parallel_size > 1 and frees


def _send(wrapped, instance, args, kwargs):
    """Send another tensor with the same data. The schedule takes the data out of its own one, and
    the work of a process group holds on to the tensor that it was given."""
    from torch import Tensor

    output = argument(wrapped, args, kwargs, "output_tensor")
    if not isinstance(output, Tensor) or not is_glm5(instance.config):
        return wrapped(*args, **kwargs)
    args, kwargs = with_argument(wrapped, args, kwargs, "output_tensor", output.detach())
    return wrapped(*args, **kwargs)
