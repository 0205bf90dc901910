"""Kernels of other libraries: when they are used, and how they are called. The libraries themselves
stand in by their documented contract, in plain torch; test_libraries_cuda.py runs the real ones."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops import fallback, registry
from glm5_patch.ops.index_topk import cudnn as cudnn_selection
from glm5_patch.ops.index_topk import triton as indexer_kernels
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call, Needs, Width
from glm5_patch.ops.registry import backends, choose, why_not
from glm5_patch.ops.sparse_attention import cudnn, flash_mla
from glm5_patch.ops.sparse_attention import triton as sparse_mla
from glm5_patch.ops.sparse_attention.inputs import AbsorbedInputs
from tests.ops.test_triton import DEVICE, SMALL, chosen_keys, layout
from tests.tiny import relative

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing compared yet, nothing refused."""
    monkeypatch.setattr(fallback, "_compared", set())
    monkeypatch.setattr(registry, "_refused", {})


@pytest.fixture(autouse=True)
def loaders():
    """What is imported of the libraries, forgotten before and after."""
    found = flash_mla.flash_mla_sparse_fwd, cudnn.sparse_attention_backward
    found += cudnn_selection.indexer_topk, registry._loads
    for loader in found:
        loader.cache_clear()
    yield
    for loader in found:
        loader.cache_clear()
    cudnn_selection._plans.clear()


def record(operation, name):
    (one,) = (one for one in backends(operation) if one.name == name)
    return one


def stand_in(name, monkeypatch, **contents):
    """A module in the place of a library."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def attention(q, kv, keys, scale):
    """Outputs, natural log-sum-exp and the part of each key's probability, in fp64."""
    valid = keys >= 0
    chosen = kv[keys.clamp_min(0).long()].double()  # [s, k, width]
    logits = torch.einsum("shd,skd->shk", q.double(), chosen) * scale
    logits = logits.masked_fill(~valid[:, None], float("-inf"))
    return logits, chosen


@pytest.fixture
def flash_mla_there(monkeypatch):
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

    stand_in("flash_mla", monkeypatch, flash_mla_sparse_fwd=flash_mla_sparse_fwd)


@pytest.fixture
def cudnn_there(monkeypatch):
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
    stand_in("cudnn", monkeypatch, DSA=SimpleNamespace(**functions))


def absorbed_inputs(lengths, batch, k, seed):
    queries = layout(lengths)
    s, width = len(queries.starts), SMALL.latent + SMALL.rope
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(s, batch, 4, width, generator=generator).to(DEVICE)
    latent = torch.randn(s, batch, width, generator=generator).to(DEVICE)
    topk_indices = chosen_keys(queries, batch, k, seed)
    d_out = torch.randn(s, batch, 4, SMALL.latent, generator=generator).to(DEVICE)
    return AbsorbedInputs(query, latent, topk_indices, *queries.spans(), SMALL.latent, 0.2), d_out


SEEDS = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
LAYOUTS = pytest.mark.parametrize(
    ("lengths", "batch"),
    [
        pytest.param([24], 1, id="one"),
        pytest.param([24], 3, id="batch", marks=pytest.mark.nightly),
        pytest.param([1, 13, 10], 1, id="thd"),
    ],
)


@LAYOUTS
@SEEDS
def test_flash_mla_gets_what_it_documents(lengths, batch, seed, flash_mla_there):
    absorbed, _ = absorbed_inputs(lengths, batch, 7, seed)
    for theirs, ours in zip(flash_mla.forward(absorbed), sparse_mla.forward(absorbed)):
        assert relative(theirs, ours) < 1e-5


def test_a_query_without_keys_is_told_from_the_log_sum_exp_of_flash_mla(flash_mla_there):
    absorbed, _ = absorbed_inputs([24], 1, 7, 0)
    absorbed.topk_indices[0, 9] = -1
    (out, lse), (expected, expected_lse) = flash_mla.forward(absorbed), sparse_mla.forward(absorbed)
    assert out[9].abs().max() == expected[9].abs().max() == 0
    assert torch.equal(lse[9], expected_lse[9])


@LAYOUTS
@SEEDS
def test_cudnn_gets_what_it_documents(lengths, batch, seed, cudnn_there):
    absorbed, d_out = absorbed_inputs(lengths, batch, 7, seed)
    out, lse = sparse_mla.forward(absorbed)
    theirs, ours = (one.backward(absorbed, out, lse, d_out) for one in (cudnn, sparse_mla))
    for found, expected in zip(theirs, ours):
        assert relative(found, expected) < 1e-5


@SEEDS
def test_the_selection_of_cudnn_gets_what_it_documents(seed, cudnn_there):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (25, 40), generator=generator).float().to(DEVICE)  # with ties
    spans = [span[12:37] for span in layout([40]).spans()]
    theirs, ours = (
        one.selection(scores, *spans, 37, 16) for one in (cudnn_selection, indexer_kernels)
    )
    assert torch.equal(theirs, ours)


@pytest.mark.nightly
def test_the_selection_takes_cudnn_for_long_rows(cudnn_there, interpreted, monkeypatch):
    """The very selection of the indexer: blocks, and rows short enough for this package's own."""
    queries, calls = layout([40]), []
    generator = torch.Generator().manual_seed(3)
    shapes = (40, 2, 16, 16), (40, 2, 16), (40, 2, 16)
    inputs = IndexerInputs(
        *(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    )
    ours = indexer_kernels.index_topk(inputs, queries, 8, 0.3)
    sizes = {**record("index_topk.selection", "cudnn").needs.sizes, "keys": Width(at_least=31)}
    library = dataclasses.replace(
        record("index_topk.selection", "cudnn"),
        needs=Needs(sizes=sizes, distribution="nvidia-cudnn-frontend"),
        compute=lambda *args: calls.append(args) or cudnn_selection.selection(*args),
        asked_as=("triton",),
    )
    own = backends("index_topk.selection")
    monkeypatch.setattr(
        registry,
        "backends",
        lambda name=None: (library, *own) if name == "index_topk.selection" else backends(name),
    )
    monkeypatch.setattr("glm5_patch.ops.query_positions.BLOCK_BYTES", 16 * 40 * 4)
    assert torch.equal(indexer_kernels.index_topk(inputs, queries, 8, 0.3), ours)
    assert len(calls) == 4  # of two sequences the blocks that see 32 and 40 keys, not the first
    indexer_kernels.index_topk(inputs, layout([20, 20]), 8, 0.3)
    assert len(calls) == 4


def run(name, theirs, ours, monkeypatch, heads=64, operation="sparse_attention.backward"):
    """Compute an operation of two backends: a library's, which computes ``theirs``, and ours."""
    library = dataclasses.replace(
        record(operation, name), compute=theirs, load=None, needs=NEEDS[name]
    )
    own = dataclasses.replace(record(operation, "triton"), compute=ours, load=None, needs=Needs())
    monkeypatch.setattr(registry, "backends", lambda operation=None: (library, own))
    call = Call(CPU, torch.float32, (("heads", heads),))
    return fallback.compute(operation, call), library


NEEDS = {
    "cudnn": Needs(distribution="nvidia-cudnn-frontend"),
    "flash_mla": Needs(distribution="flash_mla"),
}


def test_each_shape_class_of_an_operation_is_compared_once(monkeypatch):
    ours = []

    def compute(value, heads):
        theirs = lambda: (torch.full((3,), value), torch.zeros(2))
        own = lambda: (ours.append(1) or torch.full((3,), 1.0), torch.zeros(2))
        return run("cudnn", theirs, own, monkeypatch, heads)[0]

    assert compute(1.001, 64)[0].tolist() == pytest.approx([1.001] * 3)
    assert compute(5.0, 64)[0].tolist() == [5.0] * 3
    assert len(ours) == 1
    assert compute(1.001, 32)[0].tolist() == pytest.approx([1.001] * 3)
    assert len(ours) == 2


@pytest.mark.parametrize("wrong", [1.01, float("nan"), float("inf")])
def test_a_wrong_library_is_not_used(wrong, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    results = lambda value: lambda: (torch.ones(3), torch.full((3,), value))
    says = "sparse_attention.backward by nvidia-cudnn-frontend .*is off by .*, where 5e-03"
    with pytest.warns(RuntimeWarning, match=says):
        found, library = run("cudnn", results(wrong), results(1.0), monkeypatch)
    assert [tensor.tolist() for tensor in found] == [[1.0] * 3] * 2
    assert "is off by" in why_not(library, Call(CPU, torch.float32))


def test_a_wrong_library_that_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "flash_mla")
    results = lambda value: lambda: (torch.full((3,), value),)
    forward = "sparse_attention.forward"
    with pytest.raises(GLM5PatchError, match="=flash_mla: .*forward by flash_mla .*set it to tri"):
        run("flash_mla", results(2.0), results(1.0), monkeypatch, operation=forward)


def test_a_library_that_fails_is_not_used(monkeypatch):
    def fail():
        raise ValueError("no such architecture")

    ours = lambda: (torch.ones(3),)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    with pytest.warns(RuntimeWarning, match="by nvidia-cudnn-.* failed: ValueError: no such"):
        (found,), _ = run("cudnn", fail, ours, monkeypatch)
    assert found.tolist() == [1.0] * 3 and "failed" in registry._refused["cudnn"]
    registry._refused.clear()
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "cudnn")
    with pytest.raises(GLM5PatchError, match="=cudnn: .* failed: ValueError"):
        run("cudnn", fail, ours, monkeypatch)


def test_a_library_that_does_not_load_is_named(monkeypatch):
    """As an older cuDNN, without DSA."""
    stand_in("cudnn", monkeypatch)
    verdict = registry._loads(record("sparse_attention.backward", "cudnn"))
    assert not verdict.ok
    assert verdict.reason.startswith(
        "nvidia-cudnn-frontend does not load: ImportError: cannot import name"
    )


def test_numbers_that_are_not_finite_say_nothing_about_a_library(monkeypatch):
    nan = lambda: (torch.full((3,), float("nan")),)
    assert run("cudnn", nan, nan, monkeypatch)[0][0].isnan().all()
    assert not registry._refused and not fallback._compared


@pytest.mark.parametrize("part, library", [("forward", "flash_mla"), ("backward", "cudnn")])
def test_kernels_of_hopper_come_before_a_library_and_that_before_the_others(part, library):
    names = [one.name for one in backends(f"sparse_attention.{part}")]
    assert list(dict.fromkeys(names)) == ["gluon", library, "triton", "torch"]


LIBRARIES = [("sparse_attention.forward", "flash_mla"), ("sparse_attention.backward", "cudnn")]


@pytest.mark.parametrize(("operation", "name"), LIBRARIES)
def test_a_library_that_can_not_is_an_error_if_it_is_asked_for(operation, name, monkeypatch):
    one, call = record(operation, name), Call(CPU, torch.bfloat16)
    monkeypatch.setattr("glm5_patch.ops.needs._is_installed", lambda module: True)
    says = {"auto": "the tensors are on cpu", "torch": "GLM5_PATCH_KERNELS=torch"}
    for asked, reason in says.items():
        monkeypatch.setenv("GLM5_PATCH_KERNELS", asked)
        assert why_not(one, call) == reason
        assert choose(operation, call).name == "torch"
    monkeypatch.setenv("GLM5_PATCH_KERNELS", name)
    with pytest.raises(GLM5PatchError, match=f"={name}: the tensors are on cpu; unset it, or set"):
        choose(operation, call)
    monkeypatch.setattr("glm5_patch.ops.needs._is_installed", lambda module: False)
    with pytest.raises(GLM5PatchError, match=f"={name}: .* is not installed"):
        choose(operation, call)


def test_shapes_that_a_library_does_not_take(monkeypatch):
    monkeypatch.setattr("glm5_patch.ops.needs._is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    widths = dict(heads=64, kv_lora_rank=512, qk_pos_emb_head_dim=64)

    def reason(one, dtype=torch.bfloat16, sizes=(("dsa_indexer_topk", 2048),), **changes):
        return one.needs.check(
            Call(cuda, dtype, tuple({**widths, **changes}.items()), sizes)
        ).reason

    forward, backward = (record(*library) for library in LIBRARIES)
    assert reason(forward) == reason(backward) == ""
    assert "bfloat16, not float16" in reason(forward, torch.float16)
    assert reason(backward, torch.float16) == ""
    assert "not float32" in reason(backward, torch.float32)
    assert "96 must be a multiple of 128" in reason(forward, sizes=(("dsa_indexer_topk", 96),))
    for one in (forward, backward):
        assert "heads=12 must be" in reason(one, heads=12)
        assert "kv_lora_rank=256 must be 512" in reason(one, kv_lora_rank=256)
        assert "query_numbers" in reason(one, sizes=(("query_numbers", 2**31),))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "10.0 must be at least 9.0 and below 10.0" in reason(forward)
