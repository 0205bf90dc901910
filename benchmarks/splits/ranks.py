"""The ranks of a run, in process groups of their own for each attempt.

A rank that fails alone, out of memory, would leave the others in a collective for ever. Here they
end it, say what failed, and the next attempt begins with new groups.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, distributed_c10d

TIMEOUT = timedelta(minutes=5)
"""Of a collective, and of a rank that says nothing."""
_FAILED = "failed"


class Ranks:
    """All ranks that torchrun started."""

    def __init__(self, on_gpu: bool):
        # A process must outlive the collectives that it gives up.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        rendezvous = distributed_c10d.rendezvous("env://", timeout=TIMEOUT)
        self._store, self.rank, self.size = next(rendezvous)
        self._on_gpu = on_gpu
        self._numbers = itertools.count()

    def attempt(self, run: Callable[[], None]) -> str | None:
        """Run something on all ranks.

        Returns:
            What failed on the first rank that did, or None; the same on all ranks.
        """
        store = PrefixStore(f"attempt{next(self._numbers)}", self._store)
        torch.distributed.init_process_group(
            "nccl" if self._on_gpu else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(store, done), daemon=True)
        if self._on_gpu:
            watch.start()
        failed = False
        try:
            run()
            torch.distributed.barrier()
        except Exception as problem:  # any: the other splits go on
            failed = True
            says = str(problem).partition("\n")[0]
            text = f"{type(problem).__name__}: {says[:160]}"
            first = store.compare_set(_FAILED, "", f"rank {self.rank}: {text}")
            if first.startswith(f"rank {self.rank}:".encode()):
                traceback.print_exc()
        done.set()
        if self._on_gpu:
            watch.join()
        self._end(failed)
        store.set(f"ended{self.rank}", "")
        store.wait([f"ended{rank}" for rank in range(self.size)], TIMEOUT)
        return store.get(_FAILED).decode() if store.check([_FAILED]) else None

    def _watch(self, store: PrefixStore, done: threading.Event) -> None:
        """End the collectives of this rank if another one has failed."""
        store = store.clone()  # a store serves one thread at a time
        while not done.wait(1):
            if store.check([_FAILED]):
                distributed_c10d._abort_process_group()
                return

    def _end(self, failed: bool) -> None:
        if not torch.distributed.is_initialized():
            pass  # ``_watch`` has ended it
        elif failed and self._on_gpu:
            distributed_c10d._abort_process_group()
        else:
            torch.distributed.destroy_process_group()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
