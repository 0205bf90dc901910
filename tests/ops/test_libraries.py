"""Kernels of other libraries: when they are used, and how they are called. The libraries themselves
stand in by their documented contract, in plain torch; test_libraries_cuda.py runs the real ones."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops import compared as libraries
from glm5_patch.ops.index_topk import triton as indexer_kernels
from glm5_patch.ops.sparse_attention import triton as sparse_mla
from tests.ops.test_triton import DEVICE, SMALL, chosen_keys, layout
from tests.tiny import relative

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing compared yet, nothing refused."""
    monkeypatch.setattr(libraries, "_compared", set())
    monkeypatch.setattr(libraries, "_refused", {})


def adapter(name, monkeypatch, **contents):
    """This package's module that calls a library, over a stand-in for that."""
    stand_in = ModuleType(libraries.LIBRARIES[name].module)
    vars(stand_in).update(contents)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    full_name = f"{libraries.__package__}.{libraries.LIBRARIES[name].adapter}"
    monkeypatch.delitem(sys.modules, full_name, raising=False)
    yield libraries.adapter_of(name)
    sys.modules.pop(full_name)


def attention(q, kv, keys, scale):
    """Outputs, natural log-sum-exp and the part of each key's probability, in fp64."""
    valid = keys >= 0
    chosen = kv[keys.clamp_min(0).long()].double()  # [s, k, width]
    logits = torch.einsum("shd,skd->shk", q.double(), chosen) * scale
    logits = logits.masked_fill(~valid[:, None], float("-inf"))
    return logits, chosen


@pytest.fixture
def flash_mla(monkeypatch):
    """``flash_mla_sparse_fwd`` as its docstring has it."""

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        keys = indices[:, 0].clone()
        keys[torch.arange(keys.shape[1], device=keys.device) >= topk_length[:, None]] = -1
        logits, chosen = attention(q, kv[:, 0], keys, sm_scale)
        lse = logits.logsumexp(-1)
        empty = lse == float("-inf")
        probs = (logits - lse.masked_fill(empty, 0.0)[..., None]).exp()
        out = torch.einsum("shk,skd->shd", probs, chosen[..., :d_v])
        return out.to(q.dtype), logits.amax(-1), lse.masked_fill(empty, float("inf")).float()

    yield from adapter("flash_mla", monkeypatch, flash_mla_sparse_fwd=flash_mla_sparse_fwd)


@pytest.fixture
def cudnn_dsa(monkeypatch):
    """The backward and the top-k as their docstrings have them."""

    def backward(q, kv, out, dout, lse, attn_sink, topk_idxs, softmax_scale, topk_length):
        assert (attn_sink == float("-inf")).all()
        keys = topk_idxs.clone()
        keys[torch.arange(keys.shape[1], device=keys.device) >= topk_length[:, None]] = -1
        logits, chosen = attention(q, kv, keys, softmax_scale)
        probs = (logits - lse.double()[..., None]).exp()
        values, dout = chosen[..., : out.shape[-1]], dout.double()
        delta = (out.double() * dout).sum(-1, keepdim=True)
        d_logits = probs * (torch.einsum("shd,skd->shk", dout, values) - delta) * softmax_scale
        d_chosen = torch.einsum("shk,shd->skd", d_logits, q.double())
        d_chosen[..., : out.shape[-1]] += torch.einsum("shk,shd->skd", probs, dout)
        dkv = torch.zeros_like(kv, dtype=torch.float64)
        dkv.index_add_(0, keys.clamp_min(0).flatten().long(), d_chosen.flatten(0, 1))
        dq = torch.einsum("shk,skd->shd", d_logits, chosen)
        return {"dq": dq.to(q.dtype), "dkv": dkv.to(kv.dtype)}

    class IndexerTopK:
        def __init__(self, sample_input_values, sample_seq_lens, top_k, return_val, deterministic):
            assert deterministic and not return_val
            self.shape, self.k, self.compiled = sample_input_values.shape, top_k, False

        def check_support(self):
            return True

        def compile(self):
            self.compiled = True

        def scratch_workspace_bytes(self):
            return 8 * self.shape.numel()

        def execute(self, input_values, seq_lens, *, out_indices, workspace):
            assert self.compiled and input_values.shape == self.shape
            assert len(workspace) == self.scratch_workspace_bytes()
            out_indices.fill_(-1)
            for row, length in enumerate(seq_lens.tolist()):
                order = input_values[row, :length].sort(descending=True, stable=True)[1][: self.k]
                out_indices[row, : len(order)] = order.sort()[0].int()

    functions = dict(sparse_attention_backward_wrapper=backward, IndexerTopK=IndexerTopK)
    yield from adapter("cudnn", monkeypatch, DSA=SimpleNamespace(**functions))


@pytest.fixture
def cudnn_topk(cudnn_dsa, monkeypatch):
    """The module of the top-k, over the same stand-in."""
    full_name = "glm5_patch.ops.index_topk.cudnn"
    monkeypatch.delitem(sys.modules, full_name, raising=False)
    yield importlib.import_module(full_name)
    sys.modules.pop(full_name)


def absorbed_inputs(lengths, batch, k, seed):
    queries = layout(lengths)
    s, width = len(queries.starts), SMALL.latent + SMALL.rope
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(s, batch, 4, width, generator=generator).to(DEVICE)
    latent = torch.randn(s, batch, width, generator=generator).to(DEVICE)
    where = (chosen_keys(queries, batch, k, seed), *queries.spans())
    d_out = torch.randn(s, batch, 4, SMALL.latent, generator=generator).to(DEVICE)
    return query, latent, where, d_out


LAYOUTS = pytest.mark.parametrize(
    ("lengths", "batch"), [([24], 1), ([24], 3), ([1, 13, 10], 1)], ids=["one", "batch", "thd"]
)


@LAYOUTS
@pytest.mark.parametrize("seed", range(2))
def test_flash_mla_gets_what_it_documents(lengths, batch, seed, flash_mla):
    query, latent, where, _ = absorbed_inputs(lengths, batch, 7, seed)
    args = (query, latent, *where, SMALL.latent, 0.2)
    for theirs, ours in zip(flash_mla.forward(*args), sparse_mla.forward(*args)):
        assert relative(theirs, ours) < 1e-5


def test_a_query_without_keys_is_told_from_the_log_sum_exp_of_flash_mla(flash_mla):
    query, latent, (topk, *spans), _ = absorbed_inputs([24], 1, 7, 0)
    topk[0, 9] = -1
    args = (query, latent, topk, *spans, SMALL.latent, 0.2)
    (out, lse), (expected, expected_lse) = flash_mla.forward(*args), sparse_mla.forward(*args)
    assert out[9].abs().max() == expected[9].abs().max() == 0
    assert torch.equal(lse[9], expected_lse[9])


@LAYOUTS
@pytest.mark.parametrize("seed", range(2))
def test_cudnn_gets_what_it_documents(lengths, batch, seed, cudnn_dsa):
    query, latent, where, d_out = absorbed_inputs(lengths, batch, 7, seed)
    out, lse = sparse_mla.forward(query, latent, *where, SMALL.latent, 0.2)
    theirs = cudnn_dsa.backward(query, latent, *where, d_out, out, lse, 0.2)
    delta = sparse_mla.row_terms(out, d_out)
    ours = sparse_mla.backward(query, latent, *where, d_out, lse, delta, 0.2, False)
    for found, expected in zip(theirs, ours):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_the_top_k_of_cudnn_gets_what_it_documents(seed, cudnn_topk):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (25, 40), generator=generator).float().to(DEVICE)  # with ties
    starts, positions = layout([40]).spans()
    block = slice(12, 37)
    theirs, ours = (torch.empty((25, 16), dtype=torch.int32, device=DEVICE) for _ in range(2))
    cudnn_topk.topk(scores, positions[block], theirs)
    indexer_kernels.topk(scores, starts, positions, block, 37, ours)
    assert torch.equal(theirs, ours)


def test_the_selection_takes_the_top_k_of_cudnn_for_long_rows(cudnn_topk, monkeypatch):
    """The very top-k of the indexer: blocks, and rows short enough for this package's own."""
    queries, calls = layout([40]), []
    generator = torch.Generator().manual_seed(3)
    shapes = (40, 2, 16, 16), (40, 2, 16), (40, 2, 16)
    inputs = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    monkeypatch.setattr(libraries, "why_not", lambda name, device: "not now")
    ours = indexer_kernels.select(*inputs, queries, 8, 0.3)
    real = cudnn_topk.topk
    monkeypatch.setattr(libraries, "why_not", lambda name, device: None)
    monkeypatch.setattr(indexer_kernels, "CUDNN_ABOVE", 30)
    monkeypatch.setattr("glm5_patch.ops.query_positions.BLOCK_BYTES", 16 * 40 * 4)
    monkeypatch.setattr(cudnn_topk, "topk", lambda *args: calls.append(args) or real(*args))
    assert torch.equal(indexer_kernels.select(*inputs, queries, 8, 0.3), ours)
    assert len(calls) == 4  # of two sequences the blocks that see 32 and 40 keys, not that of 16
    packed = layout([20, 20])
    indexer_kernels.select(*inputs, packed, 8, 0.3)
    assert len(calls) == 4


def test_an_operation_is_compared_once():
    ours = []

    def run(value):
        return libraries.compared(
            "cudnn",
            "backward",
            lambda: (torch.full((3,), value), torch.zeros(2)),
            lambda: (ours.append(1) or torch.full((3,), 1.0), torch.zeros(2)),
        )

    assert run(1.001)[0].tolist() == pytest.approx([1.001] * 3)
    assert run(5.0)[0].tolist() == [5.0] * 3
    assert len(ours) == 1


@pytest.mark.parametrize("wrong", [1.01, float("nan"), float("inf")])
def test_a_wrong_library_is_not_used(wrong, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    monkeypatch.setattr(libraries, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    results = lambda value: lambda: (torch.ones(3), torch.full((3,), value))
    says = (
        r"the backward of nvidia-cudnn-frontend .*is off by .* from glm5-patch's own, where 5e-03"
    )
    with pytest.warns(RuntimeWarning, match=says):
        found = libraries.compared("cudnn", "backward", results(wrong), results(1.0))
    assert [tensor.tolist() for tensor in found] == [[1.0] * 3] * 2
    assert "is off by" in libraries.why_not("cudnn", torch.device("cuda"))


def test_a_wrong_library_that_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "flash_mla")
    results = lambda value: lambda: (torch.full((3,), value),)
    with pytest.raises(
        GLM5PatchError, match="=flash_mla: the forward of flash_mla .*set it to tri"
    ):
        libraries.compared("flash_mla", "forward", results(2.0), results(1.0))


def test_a_library_that_fails_is_not_used(monkeypatch):
    def fail():
        raise ValueError("no such architecture")

    ours = lambda: (torch.ones(3),)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    with pytest.warns(RuntimeWarning, match="top-k of nvidia-cudnn-.* failed: ValueError: no such"):
        (found,) = libraries.compared("cudnn", "top-k", fail, ours)
    assert found.tolist() == [1.0] * 3 and "failed" in libraries._refused["cudnn"]
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "cudnn")
    with pytest.raises(GLM5PatchError, match="=cudnn: the top-k of .* failed: ValueError"):
        libraries.compared("cudnn", "top-k", fail, ours)


def test_a_library_that_does_not_load_is_named(monkeypatch):
    """As an older cuDNN, without DSA."""
    monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))
    monkeypatch.delitem(
        sys.modules, f"{libraries.__package__}.sparse_attention.cudnn", raising=False
    )
    libraries._why_not_loaded.cache_clear()
    says = libraries._why_not_loaded("cudnn")
    libraries._why_not_loaded.cache_clear()
    assert says.startswith("nvidia-cudnn-frontend does not load: ImportError: cannot import name")


def test_numbers_that_are_not_finite_say_nothing_about_a_library(monkeypatch):
    nan = lambda: (torch.full((3,), float("nan")),)
    assert libraries.compared("cudnn", "backward", nan, nan)[0].isnan().all()
    assert not libraries._refused and not libraries._compared


@pytest.mark.parametrize("name", ["flash_mla", "cudnn"])
def test_a_library_that_can_not_is_an_error_if_it_is_asked_for(name, monkeypatch):
    query = torch.zeros(4, 1, 64, 576)
    monkeypatch.setattr(libraries, "_is_installed", lambda module: True)
    for asked, says in {
        "auto": "the tensors are on cpu",
        "torch": "GLM5_PATCH_KERNELS=torch",
    }.items():
        monkeypatch.setenv("GLM5_PATCH_KERNELS", asked)
        assert libraries.why_not(name, CPU) == says
        assert not libraries.takes(name, query, 512, 2048)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", name)
    with pytest.raises(GLM5PatchError, match=f"={name}: the tensors are on cpu; unset it, or set"):
        libraries.takes(name, query, 512, 2048)
    monkeypatch.setattr(libraries, "_is_installed", lambda module: False)
    with pytest.raises(GLM5PatchError, match=f"={name}: .* is not installed"):
        libraries.takes(name, query, 512, 2048)


def test_shapes_that_a_library_does_not_take(flash_mla, cudnn_dsa):
    fits = torch.empty(4, 1, 64, 576, dtype=torch.bfloat16)
    assert flash_mla.why_not_shape(fits, 512, 2048) is None
    assert cudnn_dsa.why_not_shape(fits, 512, 2048) is None
    half, few, narrow = fits.half(), fits[:, :, :12], fits[..., :320]
    long = torch.empty(2**16, 1, 64, 576, dtype=torch.bfloat16, device="meta")
    assert "bfloat16, not float16" in flash_mla.why_not_shape(half, 512, 2048)
    assert cudnn_dsa.why_not_shape(half, 512, 2048) is None
    assert "not float32" in cudnn_dsa.why_not_shape(fits.float(), 512, 2048)
    assert "multiple of 128, not 96" in flash_mla.why_not_shape(fits, 512, 96)
    for module in (flash_mla, cudnn_dsa):
        assert " 12" in module.why_not_shape(few, 512, 2048)
        assert "not 256 + 64" in module.why_not_shape(narrow, 256, 2048)
        assert "32 bits" in module.why_not_shape(long, 512, 2048)
