"""A ``GPTModel`` of the layers that a program's spec function describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch


def describes_layers(function: Callable) -> bool:
    """Whether it is a spec function: of ``config``, perhaps with ``args`` and ``vp_stage``."""
    try:
        return "config" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def model_of(function: Callable, directory: Path):
    """The model, loaded.

    Args:
        function: gets, by name, what it asks for of ``config`` (a ``TransformerConfig`` of the
            checkpoint), ``args`` (with ``hf_checkpoint``, the directory) and ``vp_stage`` (None);
            returns what ``GPTModel`` takes as its layers' spec.
        directory: of the checkpoint.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    from ...attention.build import check_environment, transformer_config
    from ...checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(directory)
    hf, on_cpu = checkpoint.config, not torch.cuda.is_available()
    config = transformer_config(
        hf,
        transformer_impl="local",
        params_dtype=torch.float32,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        moe_token_dispatcher_type="allgather" if on_cpu else "alltoall",
    )
    check_environment(config)
    given = dict(config=config, args=SimpleNamespace(hf_checkpoint=str(directory)), vp_stage=None)
    asked = inspect.signature(function).parameters
    spec = function(**{name: value for name, value in given.items() if name in asked})
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="none",
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
    )
    checkpoint.load_into(model)
    return model if on_cpu else model.cuda()
