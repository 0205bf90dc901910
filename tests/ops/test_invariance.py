"""A query gets the same bits whatever else is in the batch: its top-k, its output, its loss."""

import itertools

import pytest
import torch

from glm5_patch.ops import query_positions
from glm5_patch.ops.index_loss.operation import index_loss
from glm5_patch.ops.index_topk import triton as indexer_kernels
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.query_positions import QueryPositions, document_starts, longest_document
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention

HEADS, INDEX_HEADS, INDEX_DIM, K, LENGTH = 6, 16, 32, 5, 21
DIMS = MLADims(latent=64, nope=24, rope=16, value=20)
LOSS_ROWS = (4, 5, 20)
"""Queries that see as many keys as are selected, one more, and most."""


def document(seed: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """What one document of a batch of one is made of; a longer one begins as a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn((120, 1, *shape), generator=generator)[:length]
    return dict(
        query=draw(HEADS, DIMS.nope + DIMS.rope),
        latent=draw(1, DIMS.latent + DIMS.rope),
        index_query=draw(INDEX_HEADS, INDEX_DIM),
        index_key=draw(INDEX_DIM),
        weights=draw(INDEX_HEADS),
    )


UP = torch.randn(
    DIMS.latent, HEADS * (DIMS.nope + DIMS.value), generator=torch.Generator().manual_seed(9)
)


class Batch:
    """Documents one after the other, and those of their queries that this rank has."""

    def __init__(self, documents, own=None, batch=1):
        self.own, bounds = own, [0, *itertools.accumulate(len(d["query"]) for d in documents)]
        together = {n: torch.cat([d[n] for d in documents]) for n in documents[0]}
        if batch > 1:  # sequences beside each other, not documents after each other
            together = {n: t.expand(-1, batch, *t.shape[2:]).clone() for n, t in together.items()}
        starts = document_starts(bounds)
        if own is None:
            self.queries = QueryPositions(starts, longest=longest_document(bounds))
            own = slice(None)
        else:
            longest = longest_document(bounds)
            self.queries = QueryPositions(starts[own], own, len(starts), longest)
        self.tensors = together
        self.query = together["query"][own].clone()
        self.inputs = IndexerInputs(
            together["index_query"][own].clone(),
            together["index_key"].clone(),
            together["weights"][own].clone(),
        )

    def attention(self, topk, query=None):
        query = self.query if query is None else query
        latent = self.tensors["latent"].clone()
        return AttentionInputs(query, latent, UP, topk, self.queries, DIMS, 0.2)

    def found(self, rows, grad=False):
        """Top-k, output and losses of some queries, given as places in the batch."""
        places = self.queries.places.tolist()
        at = [places.index(row) for row in rows]
        topk = None
        if not self.queries.all_fit(K):
            topk = index_topk(self.inputs, self.queries, K, INDEX_DIM**-0.5)
        with torch.set_grad_enabled(grad):
            output, _ = sparse_attention(self.attention(topk, self.query.requires_grad_(grad)))
        losses = []
        for row in (at[n] for n in LOSS_ROWS if n < len(at)):
            one = torch.tensor([row])
            attention = self.attention(topk).of_queries(one)
            inputs = self.inputs._replace(
                query=self.inputs.query[one], weights=self.inputs.weights[one]
            )
            settings = dict(index_scale=INDEX_DIM**-0.5, coefficient=1.0, per_token=True)
            losses.append(index_loss(inputs, attention, sparse=True, **settings))
        chosen = None if topk is None else topk[0, at]
        sequences = self.query.shape[1]  # which are equal, and their losses are added up
        return chosen, output[at, 0].detach(), torch.stack(losses).detach() / sequences


def zigzag(first: int) -> torch.Tensor:
    """What the first of two ranks has of a document that begins there."""
    chunks = torch.arange(first, first + LENGTH).chunk(4)
    return torch.cat([chunks[0], chunks[3]])


def arrangements():
    """Name -> batch, and where the queries of the document stand in it."""
    own, other, short = document(0), document(1, 13), document(2, 1)
    yield "with gradients", Batch([own]), range(LENGTH), True
    yield "packed, last", Batch([other, short, own]), range(14, 14 + LENGTH), False
    yield "packed, first, with gradients", Batch([own, other]), range(LENGTH), True
    yield "before a longer one", Batch([own, document(3, 30)]), range(LENGTH), False
    yield "in a longer one", Batch([document(0, 40)]), range(LENGTH), False
    yield "padded, in a batch of two", Batch([document(0, 32)], batch=2), range(LENGTH), False
    part = zigzag(13)
    yield "a rank's part, zigzag", Batch([other, own], own=part), part.tolist(), False
    part = torch.arange(19, 13 + LENGTH)
    yield "a rank's part, contiguous", Batch([other, own], own=part), part.tolist(), False
    places = range(13, 13 + LENGTH)
    part = torch.tensor(places).flip(0)
    yield "a rank's part, in another order", Batch([other, own], own=part), places, False


def same(ours, alone, at):
    """Which of the results differ."""
    topk, output, losses = ours
    wrong = []
    if topk is not None and alone[0] is not None and not torch.equal(topk, alone[0][at]):
        wrong.append("top-k")
    if not torch.equal(output, alone[1][at]):
        wrong.append("output")
    if len(at) == LENGTH and not torch.equal(losses, alone[2]):
        wrong.append("loss")
    return wrong


@pytest.mark.parametrize(
    "kernels, block_bytes, short",
    [
        pytest.param("torch", 1 << 28, False, id="torch"),
        pytest.param("torch", 1 << 12, False, id="torch-in-blocks"),
        pytest.param("triton", 1 << 28, True, id="triton"),  # the interpreter is slow
        pytest.param("triton", 1 << 12, False, id="triton-in-blocks", marks=pytest.mark.nightly),
    ],
)
def test_the_rest_of_the_batch_changes_no_bit(kernels, block_bytes, short, request, monkeypatch):
    if kernels == "triton":
        request.getfixturevalue("interpreted")
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(indexer_kernels, "FEWEST_QUERIES", 1)
    alone = Batch([document(0)]).found(range(LENGTH))
    wrong = {}
    every = list(arrangements())
    for name, batch, rows, grad in every[1::3] if short else every:
        first = 13 if "rank" in name else rows[0]
        at = [row - first for row in rows]
        wrong[name] = same(batch.found(rows, grad), alone, at)
    assert {name: what for name, what in wrong.items() if what} == {}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_short_document_is_computed_alike_alone_and_beside_others(kernels, request, monkeypatch):
    """Also where all of its keys fit into the top-k, and those of the others do not."""
    if kernels == "triton":
        request.getfixturevalue("interpreted")
    alone = Batch([document(0, 5)]).found(range(5))
    packed = Batch([document(0, 5), document(1, 9)]).found(range(5))
    beside = Batch([document(0, 5), document(2, 3)]).found(range(5))
    assert torch.equal(packed[1], alone[1]) and torch.equal(beside[1], alone[1])
