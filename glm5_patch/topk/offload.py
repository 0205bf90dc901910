"""Top-k that wait for their backward in host memory (``dsa_topk_offload``).

On a GPU the copies run in a stream of their own, beside the model, from and to pinned memory.
PyTorch keeps pinned memory, and hands it out again for the next microbatch once it is free and the
copies are done: it holds as many top-k as ever waited at the same time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class _Arriving(NamedTuple):
    """A top-k on the device, or on its way to it."""

    topk_indices: Tensor
    there: torch.cuda.Event | None
    """When it has come; None: it is there."""


class HostMemory:
    """The top-k of one forward that only recomputes will read."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, torch.device]] = {}
        self._arriving: dict[int, _Arriving] = {}

    def put(self, layer_number: int, topk_indices: Tensor) -> None:
        """Copy the top-k of a computing layer. The device is free of it when the caller is."""
        device = topk_indices.device
        on_gpu = device.type == "cuda"
        host = torch.empty_like(topk_indices, device="cpu", pin_memory=on_gpu)
        if on_gpu:
            topk_indices.record_stream(_stream_after_now(device))
            with torch.cuda.stream(_stream_of(device)):
                host.copy_(topk_indices, non_blocking=True)
        else:
            host.copy_(topk_indices)
        self._kept[layer_number] = host, device

    def take(self, layer_number: int) -> Tensor:
        """The top-k of a layer, for use in the current stream. It stays on the device until another
        one is asked for."""
        self._fetch(layer_number)
        topk_indices, there = self._arriving[layer_number]
        if there is not None:
            torch.cuda.current_stream(topk_indices.device).wait_event(there)
        return topk_indices

    def fetch_before(self, layer_number: int) -> None:
        """Let the top-k before that of a layer come: a backward goes from the last to the first."""
        before = max((number for number in self._kept if number < layer_number), default=None)
        if before is not None:
            self._fetch(before)

    def _fetch(self, layer_number: int) -> None:
        if layer_number not in self._arriving:
            self._arriving = {layer_number: _arriving(*self._kept[layer_number])}


def _arriving(host: Tensor, device: torch.device) -> _Arriving:
    """Begin to copy to the device."""
    # The current stream's memory: what another stream frees, this one could not use.
    topk_indices = torch.empty_like(host, device=device)
    if device.type != "cuda":
        return _Arriving(topk_indices.copy_(host), None)
    topk_indices.record_stream(_stream_after_now(device))  # it may be dropped before it has come
    with torch.cuda.stream(_stream_of(device)):
        topk_indices.copy_(host, non_blocking=True)
        return _Arriving(topk_indices, torch.cuda.current_stream(device).record_event())


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _stream_after_now(device: torch.device) -> torch.cuda.Stream:
    """The copies' stream, which goes on when the current one has done what was launched."""
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
