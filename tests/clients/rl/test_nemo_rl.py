"""NeMo-RL: what it sets on Megatron-Bridge's provider, without ``finalize()``, makes a right GLM-5.

Its package for policies refuses transformers 5.12 and later, and imports vLLM. It is made up here,
as is Ray; what builds Megatron's model is its own.
"""

import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch

import glm5_patch
from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from glm5_patch.testing.cpu_host import CudaLiterals
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU

for package in ("nemo_rl.models.megatron", "megatron.bridge"):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
standin.install()

MADE_UP = (
    "ray",
    "megatron.energon",
    "tensorboard",
    "nemo_rl.algorithms",
    "nemo_rl.data",
    "nemo_rl.distributed",
    "nemo_rl.models.generation",
    "nemo_rl.models.policy",
    "nemo_rl.utils",
)
RECIPE = dict(
    activation_checkpointing=False,
    tensor_model_parallel_size=1,
    expert_tensor_parallel_size=1,
    expert_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    num_layers_in_first_pipeline_stage=None,
    num_layers_in_last_pipeline_stage=None,
    context_parallel_size=1,
    pipeline_dtype="float32",
    sequence_parallel=False,
    moe_router_dtype="fp64",
    moe_router_load_balancing_type="none",
    moe_router_bias_update_rate=0.0,
    moe_permute_fusion=False,
    moe_enable_deepep=False,
    moe_token_dispatcher_type="allgather",
    moe_shared_expert_overlap=False,
    apply_rope_fusion=True,
    bias_activation_fusion=False,
    gradient_accumulation_fusion=False,
    use_fused_weighted_squared_relu=False,
    transformer_impl="local",
    cuda_graph_impl="none",
    fine_grained_activation_offloading=False,
)
"""Of its recipes for GRPO, but for what needs a GPU."""


class MadeUp:
    """Finds packages whose code is not wanted."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(MADE_UP):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name, __version__="99")

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def setup():
    """Its module that makes the configuration of a model."""
    finder = MadeUp()
    sys.meta_path.insert(0, finder)
    try:
        from nemo_rl.models.megatron import setup as module
    finally:
        sys.meta_path.remove(finder)
    return module


@pytest.fixture
def build(world, setup):
    def make(checkpoint, **overrides):
        from megatron.bridge import AutoBridge
        from transformers import AutoConfig

        bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(checkpoint.directory))
        provider = bridge.to_megatron_provider(load_weights=False)
        for name, value in {**CPU, "dsa_indexer_loss_coeff": 0.0}.items():
            setattr(provider, name, value)
        recompute = bool(overrides)
        config = {"megatron_cfg": {**RECIPE, "activation_checkpointing": recompute}}
        setup._apply_parallelism_config(provider, config)
        setup._apply_moe_config(provider, config)
        setup._apply_mtp_config(provider, config)
        setup._apply_precision_config(provider, config, torch.float32)
        setup._apply_performance_config(provider, config)
        provider.__post_init__()
        with CudaLiterals():
            (model,) = provider.provide_distributed_model(
                wrap_with_ddp=False, use_cpu_initialization=True
            )
        set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
        bridge.load_hf_weights([model], str(checkpoint.directory))
        glm5_patch.require(model=model)
        return model

    return make


@pytest.mark.parametrize("seed", range(3))
def test_its_model_is_right(build, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)
