"""Where a top-k enters and leaves a pipeline stage: around the call of its stack of layers."""

from __future__ import annotations

from ...config.schedule import IndexSchedule
from ...errors import MissingTopkError
from ...topk.carrier import TopkCarrier
from ...topk.stages import StageTopk, split, widen


def take(stack, carrier: TopkCarrier) -> None:
    """Split what the stage before sent: the hidden states stay the stack's input, and the top-k
    waits in the carrier.

    Args:
        stack: its ``input_tensor`` is what the schedule received, unless it is the first stage.
        carrier: of this forward.
    """
    received = None if stack.pre_process else stack.input_tensor
    width = stack.config.hidden_size
    if received is None or received.shape[-1] == width:
        return
    hidden_states, bits = split(received, width, _narrow_gradient(stack.config))
    stack.input_tensor = hidden_states
    carrier.arrived = StageTopk(bits, _tp_group(stack))


def send(stack, carrier: TopkCarrier, output):
    """The stack's output, with the top-k beside it if the next chunk starts on a skip layer.

    Raises:
        MissingTopkError: the top-k of that layer's source is not here.
    """
    topk = carrier.arrived if not len(stack.layers) else _of_next_layer(stack, carrier, output)
    carrier.end_forward()
    return output if topk is None else widen(output, topk, _narrow_gradient(stack.config))


def _of_next_layer(stack, carrier: TopkCarrier, output) -> StageTopk | None:
    schedule = IndexSchedule.from_megatron(stack.config)
    following = stack.layers[-1].layer_number + 1
    source = None if following > schedule.num_layers else schedule.source_of_rest(following)
    if source is None:
        return None
    layout = carrier.layout
    if layout is None:  # no layer of this stage is one of attention
        return carrier.arrived
    if layout.every_key_is_selected(stack.config):
        return None
    topk_indices = carrier.published(source)
    if topk_indices is None:
        raise MissingTopkError(
            f"layer {following}, the first of the next pipeline stage, reuses the top-k of layer "
            f"{source}, which this stage neither computed nor received"
        )
    return StageTopk.encode(topk_indices, output, layout, _tp_group(stack))


def _tp_group(stack):
    return stack.tp_group if stack.config.sequence_parallel else None


def _narrow_gradient(config) -> bool:
    return config.deallocate_pipeline_outputs
