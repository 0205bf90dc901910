"""Which rank holds which tokens, and that gathering puts them back."""

from types import SimpleNamespace

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.gathering import Gathering
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.topk.tokens import (
    ContextParallel,
    Deal,
    Layout,
    shared_out,
    token_group,
)
from tests.tiny import packed


class Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def splits(size, lengths, thd, order="zigzag"):
    pack = packed(lengths) if thd else None
    local = sum(lengths) // size
    groups = [Group(rank, size) for rank in range(size)]
    return [ContextParallel(group, pack, local, "cpu", order) for group in groups]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_a_chunk_from_each_end_of_the_sequence(size):
    ranks = splits(size, [16 * size], thd=False)
    first = ranks[0].queries
    assert first.positions.tolist() == [*range(8), *range(16 * size - 8, 16 * size)]
    assert first.starts.tolist() == [0] * 16
    everything = torch.cat([one.queries.positions for one in ranks])
    assert sorted(everything.tolist()) == list(range(16 * size))


def test_each_document_of_a_pack_is_split_by_itself():
    ranks = splits(2, [4, 0, 8], thd=True)
    assert ranks[0].queries.positions.tolist() == [0, 3, 4, 5, 10, 11]
    assert ranks[0].queries.starts.tolist() == [0, 0, 4, 4, 4, 4]
    assert ranks[1].queries.positions.tolist() == [1, 2, 6, 7, 8, 9]
    assert ranks[1].queries.keys == 12


@pytest.mark.parametrize("thd", [False, True])
def test_in_contiguous_order_a_document_may_cross_ranks(thd):
    ranks = splits(2, [6, 10], thd, order="contiguous")
    assert [one.queries.positions.tolist() for one in ranks] == [[*range(8)], [*range(8, 16)]]
    assert ranks[0].queries.starts.tolist() == ([0] * 6 + [6] * 2 if thd else [0] * 8)
    assert ranks[1].queries.local_positions.tolist() == [*range(2, 10)] if thd else [*range(8, 16)]
    assert ranks[0].queries.longest == (10 if thd else 16)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("thd", [False, True])
def test_gathered_tokens_come_back_in_order(thd, order, monkeypatch):
    ranks = splits(2, [8, 16, 24], thd, order)
    whole = torch.randn(48, 3)
    pieces = torch.cat([whole[one.queries.positions] for one in ranks])
    monkeypatch.setattr(Gathering, "gather", lambda self, part: pieces)
    monkeypatch.setattr(Gathering, "_work", SimpleNamespace(wait=lambda: None), raising=False)
    assert torch.equal(ranks[0].gather(whole[ranks[0].queries.positions]).wait(), whole)


def test_a_document_that_can_not_be_split_is_named():
    with pytest.raises(GLM5PatchError, match="document of 6 tokens.*multiple of 4"):
        splits(2, [6, 10], thd=True)


def layout(rank, size, cp_rank=0, cp_size=1, pack=None, order="zigzag"):
    """Of 16 tokens, on one rank of tensor and context parallelism."""
    config = SimpleNamespace(context_parallel_size=cp_size, dsa_context_parallel_order=order)
    cp_group = Group(cp_rank, cp_size)
    return Layout.of(config, cp_group, pack, 16 // cp_size, "cpu", Group(rank, size))


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_that_shares_tokens_out_has_its_part_in_order(size):
    ranks = [layout(rank, size) for rank in range(size)]
    assert torch.cat([one.queries.places for one in ranks]).tolist() == [*range(16)]
    assert {len(one.queries.starts) for one in ranks} == {16 // size}
    assert all(one.queries.keys == one.queries.most_keys == 16 for one in ranks)
    assert all(one.everyone.places.tolist() == [*range(16)] for one in ranks)
    assert all(one.num_real == 16 and one.real is None for one in ranks)


def test_a_part_of_a_pack_knows_the_starts_of_its_documents():
    ranks = [layout(rank, 2, pack=packed([6, 10])) for rank in range(2)]
    assert ranks[0].queries.starts.tolist() == [0] * 6 + [6] * 2
    assert ranks[1].queries.local_positions.tolist() == [*range(2, 10)]
    assert ranks[1].queries.most_keys == 10


def test_tokens_are_shared_out_inside_each_part_of_context_parallelism():
    found = [layout(rank, 2, cp, 2).queries.places.tolist() for cp in (0, 1) for rank in (0, 1)]
    assert found == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    found = [
        layout(rank, 2, cp, 2, order="contiguous").queries.places.tolist()
        for cp in (0, 1)
        for rank in (0, 1)
    ]
    assert found == [[*range(n, n + 4)] for n in (0, 4, 8, 12)]


def test_padding_counts_among_the_ranks_that_share_tokens_out():
    pack = packed([16])
    pack.cu_seqlens_q_padded, pack.cu_seqlens_q = pack.cu_seqlens_q, packed([11]).cu_seqlens_q
    first, last = (layout(rank, 2, pack=pack) for rank in range(2))
    assert first.real is None and last.real.tolist() == [0, 1, 2]
    assert first.num_real == last.num_real == 11


@pytest.mark.parametrize("own", [8, 7])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_of_index_scores_are_dealt_out_evenly(size, own, monkeypatch):
    """Every rank's queries see as many keys as another's, and come back to whom they belong."""
    everyone = QueryPositions.of(None, own * size, "cpu")
    deals = [Deal(everyone, Group(rank, size)) for rank in range(size)]
    dealt = [deal.queries.places for deal in deals]
    assert sorted(torch.cat(dealt).tolist()) == [*range(own * size)]
    seen = [int((places + 1).sum()) for places in dealt]
    assert max(seen) - min(seen) <= own * size  # of about own * own * size / 2
    rows = [torch.arange(own) + rank * own for rank in range(size)]
    sent: list = []

    def exchange(found, tensor, received, sent_to, group):
        """What all ranks send to this one, in their order, once all have sent."""
        sent.append(tensor.split(sent_to))
        if len(sent) > size:
            parts = [pieces[group.rank()] for pieces in sent[:size]]
            assert [len(part) for part in parts] == received
            found.copy_(torch.cat(parts))

    def exchanged(way, tensors):
        sent.clear()
        for deal, tensor in zip(deals, tensors):
            getattr(deal, way)(tensor)
        return [getattr(deal, way)(tensor) for deal, tensor in zip(deals, tensors)]

    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    out = exchanged("out", rows)
    assert all(torch.equal(*pair) for pair in zip(out, dealt))
    assert all(torch.equal(*pair) for pair in zip(exchanged("back", out), rows))


def configuration(tp=2, sequence_parallel=True):
    return SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize(
    "asked, sequence_parallel, tokens",
    [("auto", True, True), ("tokens", True, True), ("heads", True, False), ("auto", False, False)],
)
def test_tokens_are_shared_out_where_the_hidden_states_are(
    asked, sequence_parallel, tokens, monkeypatch
):
    monkeypatch.setenv("GLM5_PATCH_TP", asked)
    config, groups = configuration(2, sequence_parallel), SimpleNamespace(tp=Group(0, 2))
    assert shared_out(config).tokens is tokens
    assert token_group(config, groups) is (groups.tp if tokens else None)


def test_tokens_that_can_not_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_TP", "tokens")
    with pytest.raises(GLM5PatchError, match="sequence_parallel=False.*set sequence_parallel=True"):
        shared_out(configuration(2, False))
    assert token_group(configuration(1, False), None) is None  # one rank has all of both


def test_an_unknown_thing_to_share_out_is_refused(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_TP", "head")
    with pytest.raises(GLM5PatchError, match="did you mean 'heads'"):
        shared_out(configuration())
