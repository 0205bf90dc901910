"""mcore-bridge: right on cores that share no top-k, and recomputes correctly on those that do.

It builds on this package's layers on cores 0.16 to 0.18, and on megatron-core's on 0.19.
On 0.19 its model builder makes layers of Transformer Engine, which a CPU does not have. So its two
classes stand in layers of this package's local backend.
"""

import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch

import glm5_patch
from glm5_patch.attention.local_backend import local_spec_provider
from glm5_patch.patches.built import Owner, attentions_of
from glm5_patch.patches.megatron_core import carrying
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes, loaded
from tests.clients.stacks import MODES, block, causal_mask, config, gradients
from tests.tiny import relative

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mcore_bridge") is None, reason="mcore-bridge is not installed"
)


@pytest.fixture(scope="module")
def client():
    """The arguments of ``block`` that make a stack mcore-bridge's."""
    from tests.hosts.bridge import standin

    local_spec_provider()  # it is to find no Transformer Engine
    standin.install()
    for name, function in _DOWNLOADING.items():
        _give(name, function)
    from mcore_bridge.model.gpts.glm_moe_dsa import DSAttention
    from mcore_bridge.model.modules import TransformerBlock

    return dict(block_class=TransformerBlock, core_attention=DSAttention)


# Of packages for downloads, which mcore-bridge imports with its utilities.
_DOWNLOADING = {
    "PIL": "Image",
    "datasets.utils.filelock": "FileLock",
    "modelscope.hub.utils.utils": "get_cache_dir",
}


def _give(module: str, name: str) -> None:
    """Make a module of one name, unless its package is installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        return
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:end]))
        package.__path__ = []
        package.__spec__ = importlib.util.spec_from_loader(package.__name__, None)
        sys.modules[package.__name__] = package
    setattr(sys.modules[module], name, None)


@pytest.mark.parametrize("mask", [None, causal_mask(48)], ids=["no mask", "one mask"])
@pytest.mark.parametrize("mode", MODES)
def test_recompute_gives_the_gradients_of_no_recompute(host_attention, client, mode, mask):
    """With two microbatches in flight."""
    plain = gradients(block(config(), **client), mask)
    assert relative(gradients(block(config(**MODES[mode]), **client), mask), plain) == 0


def test_without_a_carrier_its_recompute_is_wrong(host_attention, client, monkeypatch):
    plain = gradients(block(config(), **client))
    monkeypatch.setattr(carrying, "carries", lambda stack: False)
    wrong = gradients(block(config(**MODES["uniform_1"]), **client))
    assert relative(wrong, plain) > 0.01


def test_its_model_is_known(host_attention, client):
    model = block(config(**MODES["uniform_1"]), **client)
    assert {attention.owner for attention in attentions_of(model)} == {Owner.CLIENT_ON_HOST}
    glm5_patch.require(model=model)


@pytest.fixture
def shares_nothing(client):
    """megatron-core 0.16 to 0.18."""
    row = glm5_patch.status()["mcore_bridge_layers"]
    if row.state.value == "not_needed":
        pytest.skip(f"mcore-bridge builds its own layers here: {row.reason}")
    assert row.state.value == "applied"


def made(directory, **overrides):
    """By mcore-bridge's own parser and builder, not loaded yet."""
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ModelConfig(
        **hf_to_mcore_config(AutoConfig.from_pretrained(directory)),
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        moe_token_dispatcher_type="allgather",
        variable_seq_lengths=False,
        moe_grouped_gemm=False,
        **overrides,
    )
    with mock.patch.dict(ROPE_INIT_FUNCTIONS):  # it puts in its own, which transformers can't use
        (model,) = get_mcore_model(config)
    return model


def build(checkpoint, **overrides):
    return loaded(made(checkpoint.directory, **overrides), checkpoint)


@pytest.mark.parametrize("seed", range(3))
def test_its_model_is_right_on_cores_without_index_sharing(world, shares_nothing, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)
