"""The up-projection is asked of its module, so what wraps the module counts."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.sparse_attention import absorption, operation
from glm5_patch.tools.verify import forward
from tests.patches.test_recompute import MODES, gradients
from tests.tiny import Operations, loss_of, megatron_model, relative, saved, tokens

ONE_LAYER = dict(num_hidden_layers=1, index_topk_freq=1)
pytestmark = pytest.mark.usefixtures("our_core")


class LowRank(torch.nn.Module):
    """As adapters wrap a linear layer of Megatron: the frozen layer, plus a product of two."""

    def __init__(self, wrapped, seed, rank=3):
        super().__init__()
        self.to_wrap = wrapped
        generator = torch.Generator().manual_seed(seed)
        out_features, in_features = wrapped.weight.shape
        self.down = torch.nn.Parameter(torch.randn(rank, in_features, generator=generator) / 8)
        self.up = torch.nn.Parameter(torch.randn(out_features, rank, generator=generator) / 8)
        wrapped.weight.requires_grad_(False)

    def forward(self, x):
        output, bias = self.to_wrap(x)
        return output + x @ self.down.T @ self.up.T, bias


def adapted(model):
    for number, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention
        attention.linear_kv_up_proj = LowRank(attention.linear_kv_up_proj, seed=number)
    return model


def merged(model):
    for layer in model.decoder.layers:
        adapter = layer.self_attention.linear_kv_up_proj
        layer.self_attention.linear_kv_up_proj = adapter.to_wrap
        with torch.no_grad():
            adapter.to_wrap.weight += adapter.up @ adapter.down
    return model


@pytest.mark.parametrize(
    "kernels, length",
    [("torch", 24), ("torch", 8), pytest.param("triton", 16, marks=pytest.mark.nightly)],
    ids=str,
)  # 8 keys all fit
def test_an_adapter_on_the_up_projection_is_as_good_as_merged(
    kernels, length, tmp_path, monkeypatch
):
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("a model on the CPU is for Triton's interpreter, which a GPU switches off")
    monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
    torch.use_deterministic_algorithms(True)
    try:
        model = megatron_model(saved(tmp_path, kv_lora_rank=64, **ONE_LAYER))
        ids = tokens(0, 1, length)
        plain = forward(model, ids).detach()
        model = adapted(model).train()
        logits = forward(model, ids)
        loss_of(logits, ids).backward()
        for layer in model.decoder.layers:
            adapter = layer.self_attention.linear_kv_up_proj
            assert adapter.to_wrap.weight.grad is None
            assert adapter.down.grad.norm() > 0 and adapter.up.grad.norm() > 0
        assert relative(logits, plain) > 0.01
        assert relative(forward(merged(model), ids), logits) < 1e-5
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_all_layers_need_alike_is_made_once_a_forward(tmp_path):
    """The angles of the attention and of the indexer, and the identity; recomputes make none."""
    recompute = dict(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    few = dict(num_hidden_layers=4, first_k_dense_replace=4, index_topk_freq=2)
    model = megatron_model(saved(tmp_path, **few), **recompute).train()
    ids = tokens(0, 1, 24)
    for _ in range(2):
        with Operations() as operations:
            loss_of(forward(model, ids), ids).backward()
        counts = [operations.names.count(f"aten::{name}") for name in ("cos", "sin", "eye")]
        assert counts == [2, 2, 1]


def test_decoding_with_a_cache_is_refused(tmp_path):
    model = megatron_model(saved(tmp_path, **ONE_LAYER))
    attention = model.decoder.layers[0].self_attention
    with pytest.raises(GLM5PatchError, match="KV cache is not supported"):
        attention.get_query_key_value_tensors(torch.zeros(4, 1, 64), inference_context=object())


@pytest.fixture
def absorbed(monkeypatch):
    """Absorbed queries, whose passes over the keys are torch's: the interpreter is slow."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a model on the CPU is for Triton's interpreter, which a GPU switches off")
    of_absorbed = lambda name, call, attention: absorption.absorbed_attention(attention)
    monkeypatch.setattr(operation, "compute", of_absorbed)


@pytest.fixture(scope="module")
def one_layer(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("hf"), kv_lora_rank=64, **ONE_LAYER)


def steps_of(model):
    """The gradients of two microbatches, and how often queries were projected."""
    projected = []
    projection = model.decoder.layers[0].self_attention.linear_q_up_proj
    projection.register_forward_hook(lambda *_: projected.append(1))
    batches = tokens(0, 1, 14), tokens(1, 1, 11)
    losses = [lambda model, ids=ids: loss_of(forward(model, ids), ids) for ids in batches]
    return gradients(model, losses), len(projected)


@pytest.mark.parametrize(
    ("mode", "forwards", "again"),
    [
        ("", 1, 1),
        ("uniform_1", 2, 1),
        pytest.param("core_attn", 1, 0, marks=pytest.mark.nightly),
        pytest.param("mla_up_proj", 2, 0, marks=pytest.mark.nightly),
    ],
)
def test_a_query_that_is_too_large_is_made_again(
    absorbed, one_layer, monkeypatch, mode, forwards, again
):
    """Of its own microbatch, with the same bits."""
    found = []
    for kept_bytes in (1 << 30, 0):
        monkeypatch.setattr(absorption, "KEPT_QUERY_BYTES", kept_bytes)
        model = megatron_model(one_layer, **MODES.get(mode, {}))
        of_step, projected = steps_of(model)
        found.append(of_step)
        assert projected == 2 * (forwards + (0 if kept_bytes else again))
        assert model.decoder.layers[0].self_attention.core_attention.make_query is None
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_a_query_that_would_differ_is_kept(absorbed, one_layer, monkeypatch):
    """As one of an adapter with dropout."""
    monkeypatch.setattr(absorption, "KEPT_QUERY_BYTES", 0)
    model = megatron_model(one_layer)
    model.decoder.layers[0].self_attention.linear_q_up_proj.dropout = torch.nn.Dropout(0.5)
    assert steps_of(model)[1] == 2
