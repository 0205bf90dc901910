"""Models that a test, or a benchmark, builds one after the other."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


def let_go(chunks: list[DistributedDataParallel]) -> None:
    """Let models end with the caller's last reference, and with them the threads of their process
    groups; empties the list.

    Hooks of gradients hold a model through cycles that Python's collector does not see: those of
    megatron-core's buckets, in the graph that its token dispatchers keep.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                module.token_dispatcher = None
    chunks.clear()
    gc.collect()
