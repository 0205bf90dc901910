"""A HybridModel's stack of DSA layers: forward as the host's, recompute as without recompute."""

from importlib.util import find_spec

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches.megatron_core import carrying
from tests.clients.stacks import MODES, causal_mask, config, gradients, hybrid_stack, outputs
from tests.tiny import relative


@pytest.mark.parametrize("mask", [None, causal_mask(48)], ids=["no mask", "one mask"])
@pytest.mark.parametrize("mode", MODES)
def test_recompute_gives_the_gradients_of_no_recompute(world, mode, mask):
    plain = gradients(hybrid_stack(config()), mask)
    assert relative(gradients(hybrid_stack(config(**MODES[mode])), mask), plain) == 0


def test_where_no_carrier_is_open_the_host_s_own_answer_stands(host_attention, monkeypatch):
    """Its forward is right; its recompute is what the carrier is for."""
    mask = causal_mask(48)
    ours = outputs(hybrid_stack(config()), mask)
    plain = gradients(hybrid_stack(config()))
    monkeypatch.setattr(carrying, "carries", lambda stack: False)
    for our, theirs in zip(ours, outputs(hybrid_stack(config()), causal_mask(48))):
        assert torch.equal(our, theirs)
    wrong = gradients(hybrid_stack(config(**MODES["uniform_1"])))
    assert relative(wrong, plain) > 0.01


# From megatron-core 0.19 on the host puts a latent norm in where a spec leaves it out.
PUTS_NORMS_IN = find_spec("megatron.core.transformer.mla_qk_norm_config") is not None
NORMS = pytest.mark.parametrize("norm", ["q_layernorm", "kv_layernorm"])


@pytest.mark.skipif(PUTS_NORMS_IN, reason="this host puts the norm in")
@NORMS
def test_a_layer_without_its_latent_norm_is_refused(world, norm):
    """As ``dsa_layer`` of the host's own hybrid spec has it."""
    with pytest.raises(
        GLM5PatchError, match=f"layer 1 .*qk_layernorm=True, but {norm} .*dsa_layer"
    ):
        hybrid_stack(config(), without_norm=norm)
    hybrid_stack(config(qk_layernorm=False), without_norm=norm)


@pytest.mark.skipif(not PUTS_NORMS_IN, reason="this host builds what the spec says")
@NORMS
def test_a_latent_norm_that_the_host_puts_in_is_there(world, norm):
    layer = hybrid_stack(config(), without_norm=norm).layers[0]
    assert getattr(layer.self_attention, norm).weight.numel() > 0
