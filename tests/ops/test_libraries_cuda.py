"""FlashMLA and cuDNN themselves, on a GPU, against this package's own kernels."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.ops import fallback
from glm5_patch.ops.index_topk import triton as indexer
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call
from glm5_patch.ops.query_positions import QueryPositions, document_starts, longest_document
from glm5_patch.ops.registry import libraries, why_not
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention
from tests.ops.test_sparse_attention import random_topk
from tests.tiny import relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DIMS = MLADims(latent=512, nope=192, rope=64, value=256)


@pytest.fixture(params=sorted({one.name for one in libraries()}))
def library(request, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", request.param)
    one = next(one for one in libraries() if one.name == request.param)
    if reason := why_not(one, Call(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def run(lengths, batch, heads, k, seed):
    """Output and gradients of sparse attention in bf16."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    queries = QueryPositions(document_starts(bounds).cuda(), longest=longest_document(bounds))
    s = bounds[-1]
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape, scale=1.0):
        tensor = torch.randn(shape, generator=generator, device="cuda").mul_(scale)
        return tensor.bfloat16().requires_grad_()

    inputs = (
        draw(s, batch, heads, DIMS.nope + DIMS.rope),
        draw(s, batch, 1, DIMS.latent + DIMS.rope),
        draw(DIMS.latent, heads * (DIMS.nope + DIMS.value), scale=DIMS.latent**-0.5),
    )
    chosen = random_topk(
        s, batch, k, queries.starts.cpu(), torch.Generator().manual_seed(seed)
    ).cuda()
    output, _ = sparse_attention(AttentionInputs(*inputs, chosen, queries, DIMS, 256**-0.5))
    upstream = torch.randn(output.shape, generator=generator, device="cuda").bfloat16()
    return output, *torch.autograd.grad(output, inputs, upstream)


@pytest.mark.parametrize(
    ("lengths", "batch"),
    [([1500], 1), ([1500], 2), ([1, 700, 40, 759], 1)],
    ids="one two thd".split(),
)
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("seed", range(2))
def test_attention(library, lengths, batch, heads, seed, monkeypatch):
    if library == "flash_mla" and heads == 32:
        heads = 128
    found = run(lengths, batch, heads, 256, seed)
    assert any(name == library for _, name, _ in fallback._compared)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    for theirs, ours in zip(found, run(lengths, batch, heads, 256, seed)):
        assert relative(theirs.float(), ours.float()) < 5e-3


def test_a_recompute_by_flash_mla_is_the_same_bit_for_bit(library):
    if library != "flash_mla":
        pytest.skip(f"{library} has no forward")
    first, again = (run([1500], 1, 64, 256, 0)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("length", [9000, 17000])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_top_k(library, length, kind, monkeypatch):
    if library != "cudnn":
        pytest.skip(f"{library} has no top-k")
    generator = torch.Generator("cuda").manual_seed(length)
    query = torch.randn(length, 1, 32, 128, generator=generator, device="cuda").bfloat16()
    key = torch.randn(length, 1, 128, generator=generator, device="cuda").bfloat16()
    weights = torch.randn(length, 1, 32, generator=generator, device="cuda")
    if kind == "ties":
        key[::3] = key[:1]
        weights[:, :, 4:] = 0  # most products vanish, by relu, and leave zeros of both signs
    queries = QueryPositions(torch.zeros(length, dtype=torch.int64, device="cuda"), longest=length)
    found = indexer.index_topk(IndexerInputs(query, key, weights), queries, 2048, 128**-0.5)
    assert any(key[:2] == ("index_topk.selection", "cudnn") for key in fallback._compared)
    again = indexer.index_topk(IndexerInputs(query, key, weights), queries, 2048, 128**-0.5)
    assert torch.equal(found, again)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    assert torch.equal(
        found, indexer.index_topk(IndexerInputs(query, key, weights), queries, 2048, 128**-0.5)
    )
