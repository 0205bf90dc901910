"""verl: its engine, and its patches of MLA and of recompute, are right with this attention.

Packages that it imports for rollouts and for its controller are made up where they are absent.
"""

import importlib.util
import inspect
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer as MTPLayer

import glm5_patch
from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.testing.cpu_host import CudaLiterals
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes
from tests.clients.rl.packages import made_up
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU
from tests.patches.test_recompute import MODES
from tests.tiny import add_mtp_layer, megatron_model, saved, tokens

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed", allow_module_level=True)
standin.install()  # verl imports Bridge where it is installed


@pytest.fixture(scope="module", autouse=True)
def packages():
    with made_up("ray", "tensordict", "codetiming", "orjson"):
        yield


@pytest.fixture
def patch(world, monkeypatch):
    """The module of verl's patches; what they replace is put back afterwards."""
    from megatron.core.tensor_parallel.random import CheckpointFunction
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    monkeypatch.setattr(MultiLatentAttention, "forward", MultiLatentAttention.forward)
    monkeypatch.setattr(CheckpointFunction, "backward", vars(CheckpointFunction)["backward"])
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    from verl.models.mcore import patch

    return patch


@pytest.fixture
def build(patch):
    """A model that is patched after it is built, as by verl."""

    def make(checkpoint, **overrides):
        model = megatron_model(checkpoint, **overrides)
        patch.apply_patch()
        patch.apply_patch_megatron_recomputation_backward()
        glm5_patch.require(model=model)
        return model

    return make


@pytest.mark.parametrize("seed", range(3))
def test_its_patched_model_is_right(build, tmp_path, seed):
    """megatron-core before 0.16.2 has verl's forward of MLA then."""
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    for mode in ("uniform_1", "core_attn", "mla_up_proj"):
        assert_recomputes(build, tmp_path / "hf", seed, MODES[mode])


def test_the_inputs_of_an_mtp_layer_stay(build, tmp_path):
    """Its recompute frees the inputs of a checkpoint, but not those of an MTP layer, which the
    decoder needs: it finds the layer in the closure of what is run again."""
    if "forward_func" in inspect.signature(MTPLayer._checkpointed_forward).parameters:
        pytest.skip("this megatron-core checkpoints a bound method, in which verl finds no layer")
    saved(tmp_path / "hf")
    add_mtp_layer(tmp_path / "hf")
    checkpoint, ids, decoded = HFCheckpoint(tmp_path / "hf"), tokens(0, 2, 48), []
    model = build(checkpoint, mtp_num_layers=1, **MODES["uniform_1"]).train()
    model.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    model(ids, torch.arange(48).expand_as(ids), None, labels=ids).sum().backward()
    assert decoded[0].untyped_storage().nbytes() > 0


@pytest.fixture
def build_by_engine(patch, monkeypatch):
    """Makes and loads a model by verl's Megatron engine, on Megatron-Bridge."""
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed")
    from verl.utils.torch_dtypes import PrecisionType
    from verl.workers.config import McoreEngineConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngine

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)  # an earlier model chose another backend
    monkeypatch.setattr(PrecisionType, "to_dtype", staticmethod(lambda name: torch.float32))

    def make(checkpoint, **overrides):
        from transformers import AutoConfig

        engine = object.__new__(MegatronEngine)
        # Bridge's own default trains the indexers; Hugging Face has no such gradient.
        settings = dict(CPU, variable_seq_lengths=False, dsa_indexer_loss_coeff=0.0)
        engine.engine_config = McoreEngineConfig(
            forward_only=True, override_transformer_config={**settings, **overrides}
        )
        engine.model_config = Model(
            model_type="language_model",
            share_embeddings_and_output_weights=False,
            hf_config=AutoConfig.from_pretrained(checkpoint.directory),
            local_path=str(checkpoint.directory),
            trust_remote_code=False,
            mtp=SimpleNamespace(enable=False),
        )
        engine.optimizer_config = {}
        engine.enable_routing_replay = engine._qat_enabled = False
        with CudaLiterals():  # Bridge moves the model to a GPU
            engine._build_tf_config()
            (model,) = engine._build_megatron_module()
        patch.apply_patch_megatron_recomputation_backward()
        set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
        glm5_patch.require(model=model)
        return model

    return make


class Model(SimpleNamespace):
    """verl's configuration of a model."""

    def get(self, name, default=None):
        return getattr(self, name, default)


@pytest.mark.parametrize("seed", range(3))
def test_its_engine_s_model_is_right(build_by_engine, tmp_path, seed):
    assert_equals_hugging_face(build_by_engine, tmp_path / "hf", seed)
    assert_recomputes(build_by_engine, tmp_path / "hf", seed)
