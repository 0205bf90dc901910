"""Megatron-LM's parser and builder, for ``python -m tests.hosts.cards --megatron-lm``."""

from __future__ import annotations

import os
import sys
from unittest import mock

from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.testing.cpu_host import CudaLiterals
from tests.clients.pretrain import TRAINING

ALONE = "--mtp-num-layers 1"
"""Of ``TRAINING``, what the checkpoint of the oracle does not have."""


def by_config(directory):
    """The model of ``--glm5-config``. ``MEGATRON_LM`` names the source tree, whose release is that
    of megatron-core."""
    sys.path.append(os.environ["MEGATRON_LM"])  # after the core that is tested
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_args

    flags = [*TRAINING.replace(ALONE, "").split(), "--distributed-backend", "gloo"]
    command = ["pretrain_gpt.py", *flags, "--glm5-config", str(directory)]
    with mock.patch.object(sys, "argv", command), CudaLiterals():
        args = parse_args()
        validate_args(args)
        set_args(args)
        args.padded_vocab_size = args.vocab_size + 1  # as the tokenizer of the flags has it
        from gpt_builders import gpt_builder

        model = gpt_builder(args, pre_process=True, post_process=True)
    HFCheckpoint(directory).load_into(model)
    return model
