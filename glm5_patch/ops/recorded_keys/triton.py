"""Decoding frames of recorded keys on a GPU. Nothing waits for the device.

The kernels are imported inside the functions: they need triton, this
record of them does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..needs import Needs
from ..registry import backend
from .frame import CLASSES, Unpacked
from .operation import upload

GROUP_BYTES = 64 << 20
"""Of the positions, as bits, and the marks of frames that are decoded at once."""


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


@backend(
    "recorded_keys",
    name="triton",
    rank=1,
    needs=Needs(package="triton", device="cuda", interpretable=True, capability=(8, 0)),
    load=load,
)
@torch.no_grad()
def recorded_keys(frames: Sequence[Unpacked], wanted: Tensor, k: int, device) -> Tensor:
    """As ``operation.recorded_keys``."""
    found = torch.empty((len(wanted), k), dtype=torch.int32, device=device)
    begin = 0
    for group in _groups(frames):
        end = begin + sum(frame.frame.rows for frame in group)
        to_rows = ((wanted >= begin) & (wanted < end)).nonzero().squeeze(1)
        if len(to_rows):
            _decode(group, (wanted[to_rows] - begin).numpy(), to_rows.numpy(), found)
        begin = end
    return found


def _groups(frames: Sequence[Unpacked]) -> Iterator[list[Unpacked]]:
    group, size = [], 0
    for frame in frames:
        own = frame.frame.rows * frame.width // 8 + 8 * frame.marks
        if group and size + own > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(frame)
        size += own
    if group:
        yield group


def _decode(group: list[Unpacked], of_rows: np.ndarray, to_rows: np.ndarray, found: Tensor) -> None:
    """Write the keys of some rows of a group to some rows of ``found``."""
    from . import triton_kernels as kernels

    device, k = found.device, found.shape[1]
    rows = [frame.frame.rows for frame in group]
    counts = np.concatenate([frame.counts for frame in group])
    begins = _before(counts)
    words = -(-max(frame.width for frame in group) // 32)
    flips = np.concatenate([frame.flips for frame in group]) << np.arange(CLASSES)
    tensors = _on(
        device,
        first_rows=_before(rows),
        references=np.concatenate([frame.references for frame in group]),
        flips=flips.sum(1),
        begins=begins,
        shifts=np.concatenate([frame.shifts for frame in group]),
        unary=_words([frame.unary for frame in group]),
        unary_begins=_bits_before(group, "unary", [frame.unary_bits for frame in group]),
        low=_words([frame.low for frame in group]),
        low_begins=_bits_before(group, "low", [frame.counts * frame.shifts for frame in group]),
        of_rows=of_rows,
        to_rows=to_rows,
    )
    marks = max(1, int(begins[-1]))
    sums, ranks = (torch.empty(marks, dtype=torch.int32, device=device) for _ in range(2))
    kernels.ranks[(sum(rows),)](
        tensors["unary"], tensors["unary_begins"], tensors["low"], tensors["low_begins"],
        tensors["shifts"], tensors["begins"], sums, ranks, 32 * len(tensors["unary"]),
        BITS=1024, MARKS=512, num_warps=4,
    )  # fmt: skip
    bits = torch.empty((sum(rows), words), dtype=torch.int32, device=device)
    below = torch.empty((len(group), CLASSES, words), dtype=torch.int32, device=device)
    kernels.resolve[(len(group),)](
        tensors["first_rows"], tensors["references"], tensors["flips"], tensors["begins"],
        ranks, bits, below, words, 1 << max(0, (words - 1).bit_length() - 1),
        WORDS=256, MARKS=1024, num_warps=8,
    )  # fmt: skip
    kernels.expand[(len(of_rows),)](
        bits, tensors["of_rows"], tensors["to_rows"], found, words, k, WORDS=32, num_warps=4
    )


def _on(device, **arrays: np.ndarray) -> dict[str, Tensor]:
    """Arrays as int32 on a device, in one copy. Each begins at a multiple of 16 bytes: Triton
    compiles a kernel again for other addresses."""
    padded = [np.pad(array.reshape(-1), (0, -array.size % 4)) for array in arrays.values()]
    flat = np.concatenate(padded, dtype=np.int32)
    parts = upload(torch.from_numpy(flat), device).split([array.size for array in padded])
    return {name: part[: arrays[name].size] for name, part in zip(arrays, parts)}


def _before(sizes: Sequence[int]) -> np.ndarray:
    """Where each part of these sizes begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _words(parts: list[np.ndarray]) -> np.ndarray:
    """Bytes, one part after the other, as int32; one more, since a number may begin in the last
    one."""
    whole = b"".join(parts)
    return np.frombuffer(whole.ljust(len(whole) // 4 * 4 + 8, b"\0"), dtype="<i4")


def _bits_before(group: list[Unpacked], name: str, sizes: list[np.ndarray]) -> np.ndarray:
    """At which bit each number of bits begins; each frame begins with a byte."""
    of_frames = 8 * _before([len(getattr(frame, name)) for frame in group])
    return np.concatenate([begin + _before(of)[:-1] for begin, of in zip(of_frames, sizes)])
