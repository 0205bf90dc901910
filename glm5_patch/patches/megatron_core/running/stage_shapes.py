"""``P2PCommunicator``: stages tell each other the shape of what they send."""

from __future__ import annotations

import copy

from ....config.fields import ACROSS_STAGES, is_glm5
from ....patching.patch import Finding, Patch


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
