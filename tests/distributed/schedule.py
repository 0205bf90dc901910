"""Steps by the host's own schedule, whatever the split."""

from __future__ import annotations

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func


def run(chunks, microbatches, forward_step, *, length: int, micro_batch_size: int, **options):
    """Forward and backward of all microbatches.

    Args:
        chunks: the models of this rank, one or its virtual pipeline chunks.
        microbatches: a list.
        forward_step: as megatron-core calls it, with an iterator over them and a chunk.
        length: tokens of a sequence.
        micro_batch_size: sequences of a microbatch.
        options: further arguments of the schedule.

    Returns:
        What the schedule returns: of each microbatch, on the last stage, what its loss returned.
    """
    iterators = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=length,
        micro_batch_size=micro_batch_size,
        **{"forward_only": False, **options},
    )


def train(model, microbatches) -> None:
    """The gradients of a model of one chunk; microbatches are ids [b, s], their loss the mean."""

    def forward_step(iterator, model):
        ids = next(iterator)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        output = model(ids, positions, None, labels=ids.roll(-1, 1))
        return output, lambda output: (output.mean(), {})

    b, length = microbatches[0].shape
    run([model], microbatches, forward_step, length=length, micro_batch_size=b)
