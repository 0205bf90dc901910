"""Top-k on their way to and from host memory beside the model, on a GPU."""

import pytest
import torch

from glm5_patch.topk.offload import HostMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LONG = 200_000_000
"""Cycles, about 0.1 s."""
SHAPE = 1, 1 << 10, 1 << 10


def test_copies_wait_for_the_keys_and_their_memory_for_the_copies():
    memory = HostMemory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer_number in range(1, 5):
            torch.cuda._sleep(LONG)
            memory.put(layer_number, torch.full(SHAPE, layer_number, device="cuda"))
            torch.zeros(SHAPE, dtype=torch.int64, device="cuda")  # may take the memory just freed
        sums = []
        for layer_number in (4, 3, 2, 1):
            sums.append(memory.take(layer_number).sum())
            memory.fetch_before(layer_number)
            torch.zeros(SHAPE, dtype=torch.int64, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [found.item() >> 20 for found in sums] == [4, 3, 2, 1]


def test_pinned_memory_is_used_again_by_the_next_microbatch():
    seen = set()
    for _ in range(4):
        memory = HostMemory()
        memory.put(1, torch.zeros(SHAPE, device="cuda"))
        memory.take(1)
        host, _ = memory._kept[1]
        assert host.is_pinned()
        seen.add(host.data_ptr())
        torch.cuda.synchronize()
        del memory, host
    assert len(seen) == 1
