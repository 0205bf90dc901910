"""``P2PCommunicator.send_forward_recv_forward``: a stage's output outlives its send."""

from __future__ import annotations

from typing import Any

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import frees_what_it_sends


class PipelineSends(Patch):
    id = "pipeline_sends"
    module = "megatron.core.pipeline_parallel.schedules"
    attribute = "P2PCommunicator.send_forward_recv_forward"
    why = (
        "With overlap_p2p_comm a stage's output is freed while it is sent, and others overwrite it."
    )
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
            reads=("output_tensor", "overlap_p2p_comm"),
        )

    def guards(self, config) -> bool:
        overlaps = config.pipeline_model_parallel_size > 1 and config.overlap_p2p_comm
        return overlaps and config.deallocate_pipeline_outputs


class Send:
    """A send that keeps its data until it has been waited for.

    megatron-core's schedule takes the data out of the tensor that it sends, and torch's process
    groups hold on to that tensor alone.
    """

    last: tuple[Any, Send] | None = None
    """The process group and its latest send: no schedule waits for the last one of a step."""

    def __init__(self, work, sent) -> None:
        self._work, self._data = work, sent.detach()

    def wait(self, *args) -> None:
        if self._data is not None:
            self._work.wait(*args)
            self._data = None


def _send(wrapped, instance, args, kwargs):
    found = wrapped(*args, **kwargs)
    if not is_glm5(instance.config) or not argument(wrapped, args, kwargs, "overlap_p2p_comm"):
        return found
    works = found[1]
    if works and "send_next" in works:
        output = argument(wrapped, args, kwargs, "output_tensor")
        works["send_next"] = Send(works["send_next"], output)
        if Send.last is not None and Send.last[0] is instance.pp_group:
            Send.last[1].wait()
        Send.last = instance.pp_group, works["send_next"]
    return found
