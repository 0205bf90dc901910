"""mcore-bridge, for ``python -m tests.clients.judge``."""

from __future__ import annotations

from unittest import mock

from glm5_patch.attention.local_backend import local_spec_provider
from glm5_patch.checkpoint.reader import HFCheckpoint
from tests.clients.judged.core import released
from tests.clients.test_mcore_bridge import _DOWNLOADING, _give, made
from tests.hosts.bridge import standin


def _prepare() -> None:
    local_spec_provider()  # it is to find no Transformer Engine
    standin.install()
    for name, function in _DOWNLOADING.items():
        _give(name, function)


def built(directory):
    """By its own parser and builder, on cores up to 0.18."""
    _prepare()
    model = made(directory)
    HFCheckpoint(directory).load_into(model)
    return model


def layers(directory):
    """Its block and its attention in megatron-core 0.19's layers, with ``--released``: its builder
    makes layers of Transformer Engine."""
    _prepare()
    from mcore_bridge.model.gpts.glm_moe_dsa import DSAttention
    from mcore_bridge.model.modules import TransformerBlock
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt import gpt_model

    name = "get_transformer_block_with_experimental_attention_variant_spec"
    make = getattr(specs, name)

    def spec(config, *args, **kwargs):
        block = make(config, *args, **kwargs)
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention.module = DSAttention
        return block

    with (
        mock.patch.object(specs, name, spec),
        mock.patch.object(gpt_model, "TransformerBlock", TransformerBlock),
    ):
        return released(directory)
