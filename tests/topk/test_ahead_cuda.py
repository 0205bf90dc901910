"""Keys decoded in another stream of a GPU: nothing waits, and none is used before it is there."""

import pytest
import torch

from glm5_patch.topk.ahead import Ahead, Decoded
from glm5_patch.topk.carrier import open_carrier
from glm5_patch.topk.documents import Documents
from glm5_patch.topk.record import LayerName
from glm5_patch.topk.replay import replay_topk
from glm5_patch.topk.tokens import Layout
from tests.topk.test_ahead import FIRST, SECOND
from tests.topk.test_record import K, recording

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LONG = 200_000_000
"""Cycles, about 0.1 s."""


def test_keys_are_used_after_they_are_there_and_their_memory_after_they_are_used():
    def decode(name: LayerName) -> Decoded:
        torch.cuda._sleep(LONG)
        return Decoded(torch.full((1 << 20,), name.number, device="cuda"), None, None)

    ahead, sums = Ahead(decode, torch.device("cuda", 0)), []
    for number in range(1, 6):
        ahead.begin(LayerName(False, number))
        if number > 1:
            topk_indices = ahead.take(LayerName(False, number - 1)).topk_indices
            torch.cuda._sleep(LONG // 4)  # the next one is decoded, and takes memory
            sums.append(topk_indices.sum())
            del topk_indices
    assert [found.item() >> 20 for found in sums] == [1, 2, 3, 4]


def test_the_host_does_not_wait_for_the_gpu():
    from glm5_patch.ops.query_positions import QueryPositions

    made = recording()
    queries = QueryPositions.of(None, made.length, "cuda")
    layout = Layout(queries, queries, documents=Documents(None, None, queries))
    for mode in ("default", "error"):  # the first time compiles
        with replay_topk([made]), open_carrier() as carrier:
            carrier.replay.check(layout, 1, K, (1, 3))
            carrier.replay.layers = [FIRST, SECOND]
            begun = torch.cuda.Event()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                torch.cuda._sleep(10 * LONG)
                begun.record()
                found = [
                    carrier.replay.keys(name, queries, 1, K).decoded.topk_indices
                    for name in (FIRST, SECOND)
                ]
                waited = begun.query()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for name, topk_indices in zip((FIRST, SECOND), found):
                assert torch.equal(topk_indices[0, K:].cpu(), made.keys(name.number)[1])
    assert not waited
