"""``P2PCommunicator.send_forward_recv_forward``: a stage's output outlives its send."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import frees_what_it_sends


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
        overlaps = config.pipeline_model_parallel_size > 1 and config.overlap_p2p_comm
        return overlaps and config.deallocate_pipeline_outputs


def _send(wrapped, instance, args, kwargs):
    """Send another tensor with the same data. The schedule takes the data out of its own one, and
    the work of a process group holds on to the tensor that it was given."""
    from torch import Tensor

    output = argument(wrapped, args, kwargs, "output_tensor")
    if not isinstance(output, Tensor) or not is_glm5(instance.config):
        return wrapped(*args, **kwargs)
    if "output_tensor" in kwargs:
        return wrapped(*args, **{**kwargs, "output_tensor": output.detach()})
    return wrapped(output.detach(), *args[1:], **kwargs)
