"""Decoding recorded keys beside the model: the next layer's while a layer computes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .record import LayerName


class Decoded(NamedTuple):
    """The keys of one layer, on the device of the model."""

    topk_indices: Tensor
    """int32 [b, s, k] of this rank's queries, ascending, then -1."""
    missing: Tensor | None
    """bool [b, s]: which queries are not recorded; None where all ranks have every query
    recorded."""
    missing_rows: Tensor | None
    """int64: the queries that are missing in some sequence of the batch."""


@functools.cache
def _worker_of(process: int) -> ThreadPoolExecutor:
    """One thread, so that layers are decoded in order; a forked process has none of its
    parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix="glm5_patch_topk_replay")


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Ahead:
    """Layers that a thread decodes, on a GPU in a stream of its own.

    The thread launches and copies. Nothing but ``take`` waits for it, and nothing waits for the
    GPU but the stream that uses the keys.
    """

    def __init__(self, decode: Callable[[LayerName], Decoded], device: torch.device) -> None:
        """
        Args:
            decode: decodes one layer, in the current stream.
            device: of the keys.
        """
        self._decode, self._device = decode, device
        self._begun: dict[LayerName, Future] = {}

    @property
    def begun(self) -> tuple[LayerName, ...]:
        """The layers that were begun and not taken."""
        return tuple(self._begun)

    def begin(self, name: LayerName) -> None:
        """Decode a layer, if that has not begun. On a GPU it starts when the current stream has
        done what was launched before, which bounds how early its memory is taken."""
        if name in self._begun:
            return
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.current_stream(self._device).record_event()
        self._begun[name] = _worker_of(os.getpid()).submit(self._run, name, ready)

    def take(self, name: LayerName) -> Decoded:
        """The keys of a layer that was begun, for use in the current stream.

        Raises:
            GLM5PatchError: what decoding raised.
        """
        decoded, done = self._begun.pop(name).result()
        if done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            for tensor in decoded:
                if tensor is not None:
                    tensor.record_stream(stream)  # it was allocated in the other one
        return decoded

    def drop(self) -> None:
        """Forget what was begun and not taken."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    @torch.no_grad()
    def _run(
        self, name: LayerName, ready: torch.cuda.Event | None
    ) -> tuple[Decoded, torch.cuda.Event | None]:
        if ready is None:
            return self._decode(name), None
        # The current device and stream are the thread's own.
        stream = _stream_of(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(ready)
            return self._decode(name), stream.record_event()
