"""A GLM-5 that can't be built here is refused by name: field, or call, and the way out."""

import subprocess
import sys

import pytest
import torch

from glm5_patch import GLM5PatchError, HFConfig, gpt_model, single_process, transformer_config
from tests.activation.fresh import environment
from tests.tiny import hf_config, megatron_config

HF = HFConfig({**hf_config().to_dict(), "model_type": "glm_moe_dsa"})
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the errors of a CPU")


def test_without_transformer_engine_the_field_and_local_are_named(world):
    with pytest.raises(GLM5PatchError, match="transformer_impl='transformer_engine' needs .*local"):
        gpt_model(HF, transformer_config(HF))


def test_a_model_that_would_go_to_a_gpu_is_refused(world):
    with pytest.raises(GLM5PatchError, match="set use_cpu_initialization=True"):
        gpt_model(HF, transformer_config(HF, transformer_impl="local"))


def test_without_a_device_the_adapter_is_named(world, monkeypatch):
    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "current_device", no_driver)
    config = transformer_config(HF, transformer_impl="local", use_cpu_initialization=True)
    with pytest.raises(GLM5PatchError, match="Found no NVIDIA driver.*single_process\\('cpu'\\)"):
        gpt_model(HF, config)


def test_model_parallelism_is_asked_for(world, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    with pytest.raises(GLM5PatchError, match="model parallelism is not initialised"):
        gpt_model(HF, transformer_config(HF, transformer_impl="local"))


def test_a_world_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(GLM5PatchError, match="sees no CUDA device; use 'cpu'"):
        with single_process("cuda"):
            pass


def built(flavour="5.2", **settings):
    from megatron.core.transformer.transformer_config import TransformerConfig

    if "modules" in settings:
        renamed = hasattr(TransformerConfig, "cuda_graph_modules")
        name = "cuda_graph_modules" if renamed else "cuda_graph_scope"
        settings[name] = settings.pop("modules")
    hf = HFConfig(hf_config(flavour=flavour).to_dict())
    return gpt_model(hf, megatron_config(hf, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(cuda_graph_impl="local", modules="attn"),
        dict(cuda_graph_impl="local", modules=["moe_router", "attn"]),
        dict(cuda_graph_impl="local"),
        dict(cuda_graph_impl="local", modules=[]),
        dict(cuda_graph_impl="local", modules="full_iteration"),
        dict(cuda_graph_impl="transformer_engine", modules=["attn"]),
        dict(enable_cuda_graph=True),
        dict(external_cuda_graph=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("flavour", ["5.1", "5.2"])
def test_attention_in_cuda_graphs_is_refused(our_core, settings, flavour):
    with pytest.raises(
        GLM5PatchError, match="cuda_graph_impl='[a-z_]+' with .* captures attention"
    ):
        built(flavour, **settings)


@pytest.mark.parametrize("modules", ["moe_router", ["mlp"]], ids=str)
def test_other_modules_may_be_captured(world, modules):
    assert built(cuda_graph_impl="transformer_engine", modules=modules) is not None


def test_a_misspelt_override_stays_a_type_error(world):
    with pytest.raises(TypeError, match="transformer_imlp"):
        transformer_config(HF, transformer_imlp="local")


def test_without_the_plugin_the_configuration_says_so():
    code = (
        "from glm5_patch import HFConfig, transformer_config\n"
        "transformer_config(HFConfig.from_file('tests/configs/glm-5.2.json'))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment(GLM5_PATCH="0"),
    )
    assert "the plugin is not active in this process; glm5-patch doctor" in result.stderr
