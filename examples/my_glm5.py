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
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        moe_token_dispatcher_type="alltoall" if torch.cuda.is_available() else "allgather",
    )
    model = gpt_model(checkpoint.config, config)
    checkpoint.load_into(model)
    return model


def layers(config, vp_stage=None):
    """A function of ``config`` (and ``args``, ``vp_stage``) gives the layers' spec, as slime's and
    miles' ``--spec`` does. ``verify`` makes a GPTModel of it."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    build = specs.get_transformer_block_with_experimental_attention_variant_spec
    return build(config, vp_stage=vp_stage)


@contextmanager
def megatron_in_a_world_of_its_own(directory):
    """A context manager can take down what it set up."""
    from glm5_patch import single_process

    with single_process("cuda" if torch.cuda.is_available() else "cpu"):
        yield megatron(directory)
