"""Models for ``glm5-patch verify --model examples/my_glm5.py:FUNCTION``.

Each function gets the directory of a small checkpoint and returns a model.
"""

from contextlib import contextmanager

import torch


def hugging_face(directory):
    from transformers import GlmMoeDsaForCausalLM

    return GlmMoeDsaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def ids_to_logits(directory):
    """Any function of ids [b, s] will do, here one that runs a sequence at a time."""
    model = hugging_face(directory)
    return lambda ids: torch.cat([model(row[None]).logits for row in ids])


def megatron(directory):
    """A Megatron module. ``verify`` initialises model parallelism if the program has not."""
    from glm5_patch.attention.build import gpt_model, transformer_config
    from glm5_patch.checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(directory)
    config = transformer_config(
        checkpoint.config,
        transformer_impl="local",
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        moe_token_dispatcher_type="allgather",
    )
    model = gpt_model(checkpoint.config, config)
    checkpoint.load_into(model)
    return model


@contextmanager
def megatron_in_a_world_of_its_own(directory):
    """A context manager can take down what it set up."""
    from glm5_patch import single_process

    with single_process("cpu"):
        yield megatron(directory)
