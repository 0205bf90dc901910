"""With the real Transformer Engine, on a GPU; `glm5-patch demo --device cuda` tests more of it."""

import inspect

import pytest
import torch

from glm5_patch.patches.probes.megatron_core import has_transformer_engine
from glm5_patch.testing.cpu_host import single_process

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_transformer_engine(),
    reason="needs CUDA and Transformer Engine",
)


@pytest.fixture(scope="module", autouse=True)
def gpu_world():
    with single_process("cuda"):
        yield


def build(checkpoint, attention_spec=None):
    """A loaded model; with the attention of another spec if given."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    from tests.tiny import megatron_config

    config = megatron_config(
        checkpoint.config,
        transformer_impl="transformer_engine",
        use_cpu_initialization=False,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
    )
    spec = specs.get_transformer_block_with_experimental_attention_variant_spec(config)
    if attention_spec is not None:
        for layer in spec.layer_specs:
            layer.submodules.self_attention = attention_spec(config)
    model = GPTModel(config, spec, 96, 4096, position_embedding_type="none").cuda()
    checkpoint.load_into(model)
    return model


def hosts_own(config):
    """The spec that the host itself has for 'dsa', whatever its dispatcher makes of it."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    build_spec = inspect.unwrap(specs.get_dsa_module_spec_for_backend)
    return build_spec(config=config, backend=specs._get_backend_spec_provider(config=config))


def test_a_checkpoint_of_the_hosts_own_layers_loads(tmp_path):
    """Its latent norms are fused into the up projections on megatron-core 0.16 to 0.18."""
    from tests.tiny import saved, tokens

    written = build(saved(tmp_path / "a", flavour="5.1"), hosts_own).state_dict()
    model = build(saved(tmp_path / "b", flavour="5.1", seed=1))
    reference = build(saved(tmp_path / "c", flavour="5.1"))
    model.load_state_dict(written)
    ids = tokens(0, 2, 64).cuda()
    positions = torch.arange(64, device="cuda").expand_as(ids)
    with torch.no_grad():
        ours, expected = (m.eval()(ids, positions, None) for m in (model, reference))
    assert torch.equal(ours, expected)
