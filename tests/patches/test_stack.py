"""Whose attention modules a GLM-5 is built of, as ``GLM5_PATCH_ATTENTION`` asks."""

from types import SimpleNamespace

import pytest

from glm5_patch.attention.build import gpt_model
from glm5_patch.config.fields import captured_attention
from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches import MACHINE
from glm5_patch.patches.announce import describe
from glm5_patch.patches.megatron_core.building.dsa_spec import attention_stack
from glm5_patch.testing.parity import LowerTies
from glm5_patch.tools.verify import forward
from tests.patches.test_recompute import MODES, gradients, microbatches
from tests.tiny import megatron_config, megatron_model, relative, saved, tokens

SWITCH = "GLM5_PATCH_ATTENTION"


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("stack") / "hf")


@pytest.fixture
def host_attention(world, monkeypatch):
    """The host's own modules, where they can be a GLM-5's."""
    row = MACHINE.row("dsa_spec")
    if "under recompute" not in row.reason:
        pytest.skip(f"this host has no attention for a GLM-5: {row.reason}")
    monkeypatch.setenv(SWITCH, "host")


def is_plugins(model):
    modules = {type(layer.self_attention).__module__ for layer in model.decoder.layers}
    return modules == {"glm5_patch.attention.mla"}


def test_by_default_the_plugin_builds_a_glm5(checkpoint):
    assert is_plugins(megatron_model(checkpoint))


def test_a_host_that_is_wrong_is_refused(checkpoint, monkeypatch):
    row = MACHINE.row("dsa_spec")
    if "under recompute" in row.reason:
        pytest.skip("this host's attention can be a GLM-5's")
    monkeypatch.setenv(SWITCH, "host")
    with pytest.raises(GLM5PatchError, match=f"{SWITCH}=host: .*set it to plugin"):
        megatron_model(checkpoint)


def test_an_unknown_value_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv(SWITCH, "hosts")
    with pytest.raises(GLM5PatchError, match="'hosts' must be one of auto, plugin, host"):
        megatron_model(checkpoint)


@pytest.mark.parametrize(
    "asked, what",
    [("auto", "tokens (GLM5_PATCH_TP=auto)"), ("heads", "heads (GLM5_PATCH_TP=heads)")],
)
def test_the_line_says_what_tensor_parallelism_shares_out(checkpoint, monkeypatch, asked, what):
    monkeypatch.setenv("GLM5_PATCH_TP", asked)
    config = megatron_config(
        checkpoint.config, tensor_model_parallel_size=2, sequence_parallel=True
    )
    assert describe(config).endswith(f"; tensor parallelism shares out {what}")
    of_host = "shares out heads (megatron-core's attention)"
    assert describe(config, of_plugin=False).endswith(of_host)
    assert "shares out" not in describe(megatron_config(checkpoint.config))


def test_the_hosts_attention_shares_no_tokens_out(checkpoint, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_TP", "tokens")
    monkeypatch.setenv(SWITCH, "host")
    config = megatron_config(
        checkpoint.config, tensor_model_parallel_size=2, sequence_parallel=True
    )
    with pytest.raises(GLM5PatchError, match="GLM5_PATCH_TP=tokens with .*host.*set it to plugin"):
        attention_stack(config, wrong=None)


def test_the_hosts_attention_shares_no_topk_in_cuda_graphs(checkpoint, monkeypatch):
    monkeypatch.setenv(SWITCH, "host")
    config = megatron_config(checkpoint.config, cuda_graph_impl="local")
    with pytest.raises(
        GLM5PatchError, match="captures attention. Layers .* cuda_graph_impl='none'"
    ):
        attention_stack(config, wrong=None)
    config.dsa_indexer_types = ["full"] * config.num_layers
    assert not attention_stack(config, wrong=None).is_plugin


@pytest.mark.parametrize(
    ("modules", "captured"),
    [("attn", True), ("mlp,attn", True), ("full", True), (None, True), ("mlp", False)],
)
def test_a_configuration_that_nobody_has_validated_is_understood(modules, captured):
    config = SimpleNamespace(cuda_graph_impl="local", cuda_graph_modules=modules)
    assert (captured_attention(config) is not None) is captured
    config.cuda_graph_impl = "none"
    assert captured_attention(config) is None


@pytest.mark.parametrize("seed", range(2))
def test_both_compute_the_same_and_load_each_other(checkpoint, host_attention, monkeypatch, seed):
    host = megatron_model(checkpoint)
    assert not is_plugins(host)
    monkeypatch.setenv(SWITCH, "plugin")
    plugin = megatron_model(checkpoint)
    assert is_plugins(plugin)
    ids = tokens(seed, 2, 48)
    with LowerTies():  # megatron-core selects by torch.topk
        expected = forward(host, ids)
    assert (forward(plugin, ids) - expected).abs().max() < 2e-5
    state = host.state_dict()
    assert state.keys() == plugin.state_dict().keys()
    for parameter in plugin.parameters():
        parameter.data.zero_()
    plugin.load_state_dict(state)
    assert (forward(plugin, ids) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["bshd", "mask", "thd"])
def test_recompute_of_the_hosts_own(checkpoint, host_attention, layout, mode):
    """Two microbatches in flight; its own index sharing would have 74 % wrong gradients here."""
    plain = gradients(megatron_model(checkpoint), microbatches(layout, 0))
    again = gradients(megatron_model(checkpoint, **MODES[mode]), microbatches(layout, 0))
    assert plain.keys() == again.keys()
    assert max(relative(again[n], g) for n, g in plain.items() if g.any()) <= 3e-6


def test_kernels_of_the_hosts_keep_its_attention(checkpoint, host_attention, monkeypatch):
    """Built alone: the kernels themselves need a GPU."""
    monkeypatch.setenv(SWITCH, "auto")
    config = megatron_config(checkpoint.config)
    config.dsa_kernel_backend = "cudnn"
    assert not is_plugins(gpt_model(checkpoint.config, config))


def test_an_order_that_the_hosts_lacks_is_refused(checkpoint, host_attention):
    config = megatron_config(checkpoint.config)
    config.context_parallel_size, config.dsa_context_parallel_order = 2, "contiguous"
    with pytest.raises(GLM5PatchError, match="dsa_context_parallel_order='contiguous' with"):
        gpt_model(checkpoint.config, config)
