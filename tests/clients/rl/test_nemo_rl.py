"""NeMo-RL: what it sets on Megatron-Bridge's provider makes a right GLM-5.

Its functions run in their order. The values are those of its example for GRPO, except what the CPU
has not. Packages that it imports for rollouts are made up where they are absent.
"""

import importlib.util
import sys

import pytest
import torch

import glm5_patch
from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes
from tests.clients.rl.packages import made_up
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU

if importlib.util.find_spec("nemo_rl") is None:
    pytest.skip("NeMo-RL is not installed", allow_module_level=True)
standin.install()

NOT_OF_THE_MODEL = (
    *("ray", "zmq", "uvicorn", "fastapi", "prometheus_client"),
    *("tensorboard", "mlflow", "swanlab", "wandb", "matplotlib"),
)
EXAMPLE = dict(
    activation_checkpointing=False,
    tensor_model_parallel_size=1,
    expert_tensor_parallel_size=1,
    expert_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    num_layers_in_first_pipeline_stage=None,
    num_layers_in_last_pipeline_stage=None,
    context_parallel_size=1,
    sequence_parallel=False,
    moe_router_dtype="fp64",
    moe_router_load_balancing_type="none",
    moe_router_bias_update_rate=0.0,
    moe_enable_deepep=False,
    moe_shared_expert_overlap=False,
    moe_permute_fusion=False,
    use_fused_weighted_squared_relu=False,
    train_iters=1,
)
"""Of ``megatron_cfg``."""
ON_CPU = dict(
    pipeline_dtype="float32",
    moe_token_dispatcher_type="allgather",
    apply_rope_fusion=False,
    bias_activation_fusion=False,
    gradient_accumulation_fusion=False,
    transformer_impl="local",
)


@pytest.fixture(scope="module")
def setup():
    """The module that makes its model."""
    with made_up(*NOT_OF_THE_MODEL), pytest.MonkeyPatch.context() as undo:
        import megatron.bridge  # noqa: F401, which asks for the true release

        # NeMo-RL refuses transformers 5.12 and later, over a tokenizer.
        undo.setattr(sys.modules["transformers"], "__version__", "5.11.0")
        from nemo_rl.models.megatron import setup

        yield setup


@pytest.fixture
def build(setup, world):
    """Makes and loads a model of NeMo-RL's settings."""

    def make(checkpoint, **overrides):
        from megatron.bridge import AutoBridge
        from megatron.core.process_groups_config import ProcessGroupCollection

        recompute = {"activation_checkpointing": True} if overrides else {}
        config = {"megatron_cfg": {**EXAMPLE, **ON_CPU, **recompute}}
        bridge = AutoBridge.from_hf_pretrained(checkpoint.directory)
        provider = bridge.to_megatron_provider(load_weights=False)
        for name, value in CPU.items():
            setattr(provider, name, value)
        provider.dsa_indexer_loss_coeff = 0.0  # Hugging Face has no such gradient
        setup._apply_parallelism_config(provider, config)
        setup._apply_moe_config(provider, config)
        setup._apply_mtp_config(provider, config)
        setup._apply_precision_config(provider, config, torch.float32)
        setup._apply_performance_config(provider, config)
        setup._validate_training_config(config, provider)
        provider.finalize()
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        model = provider.provide(pre_process=True, post_process=True)
        set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
        bridge.load_hf_weights([model])
        glm5_patch.require(model=model)
        return model

    return make


@pytest.mark.parametrize("seed", range(3))
def test_its_model_is_right(build, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)
