"""What recorded keys take: bytes of host memory, and time to compress and to decode them.

    python benchmarks/rl/replay.py [--length 8192] [--shares 0 0.4 0.65 0.83 0.95]

Each query keeps a share of the keys of the one before it, any of them, and takes others at random,
top-k 2048. That is the worst case for this share: nothing but the query before helps to tell what
it selects. The script prints bytes beside the least that any code needs, in KiB a token of
GLM-5.2's 21 computing layers over the whole document. On a GPU it compares the decoded keys with
what was recorded, prints milliseconds of decoding a layer, and of matrix products alone, with a
layer decoded beside them, and with one decoded before them. ``recordings.py`` has selections of a
model that has learned.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import lgamma, log

import numpy as np
import torch

from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.recorded_keys.operation import recorded_keys
from glm5_patch.topk.ahead import Ahead
from glm5_patch.topk.carrier import open_carrier
from glm5_patch.topk.documents import Documents
from glm5_patch.topk.record import LayerName, TopkRecording
from glm5_patch.topk.replay import replay_topk
from glm5_patch.topk.tokens import Layout

TOPK, LAYERS = 2048, 21
LAYER = LayerName(False, 1)


def selections(length: int, share: float) -> np.ndarray:
    """Keys of the queries from TOPK on: int64 [length - TOPK, TOPK]."""
    generator = np.random.default_rng(0)
    keys, found = generator.permutation(TOPK + 1)[:TOPK], []
    for position in range(TOPK, length):
        if not share:
            found.append(generator.permutation(position + 1)[:TOPK])
            continue
        kept = generator.permutation(keys)[: round(share * TOPK)]
        free = np.ones(position + 1, dtype=bool)
        free[keys] = False
        new = generator.permutation(np.flatnonzero(free))[: TOPK - len(kept)]
        rest = np.setdiff1d(keys, kept)[: TOPK - len(kept) - len(new)]
        keys = np.concatenate([kept, new, rest])
        found.append(keys)
    return np.array(found)


def least_bytes(length: int, share: float) -> float:
    """Of a query on average: which keys go, and which come."""
    bits, gone = 0.0, TOPK - round(share * TOPK)
    for position in range(TOPK, length):
        whole = _ways(position + 1, TOPK)
        free = position + 1 - TOPK
        changed = _ways(TOPK, gone) + _ways(free, gone) if gone <= free else whole
        bits += min(whole, changed)
    return bits / 8 / (length - TOPK)


def _ways(n: int, k: int) -> float:
    """log2 of the binomial coefficient."""
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(length: int, share: float) -> TopkRecording:
    """Compress; print sizes and times of the CPU."""
    positions, keys = np.arange(TOPK, length), selections(length, share)
    made = []
    took = seconds(lambda: made.append(TopkRecording.of_keys(TOPK, length, {1: (positions, keys)})))
    (recording,) = made
    rows = length - TOPK
    unpacking = seconds(lambda: [frame.unpack() for frame in recording.layers[1]])
    per_token = LAYERS * rows / length / 1024
    print(
        f"{100 * share:3.0f} % kept: {recording.nbytes / rows:5.0f} bytes a query and layer, the "
        f"least is {least_bytes(length, share):5.0f}; {recording.nbytes / rows * per_token:5.1f} "
        f"KiB a token; compressed in {1e3 * took / rows:.2f} ms a query, taken apart in "
        f"{1e3 * unpacking:.0f} ms",
        flush=True,
    )
    return recording


def decode(recording: TopkRecording) -> None:
    """Compare, and print times of the GPU."""
    from triton.testing import do_bench

    positions, expected = recording.keys(1)
    frames = [frame.unpack() for frame in recording.layers[1]]
    rows = torch.arange(len(positions))
    if not torch.equal(recorded_keys(frames, rows, TOPK, "cuda").cpu(), expected):
        sys.exit("a recording gives other keys back on the GPU")
    alone = do_bench(lambda: recorded_keys(frames, rows, TOPK, "cuda"))
    print(f"            decoding a layer of {len(rows)} queries: {alone:.2f} ms on the GPU")
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    queries = QueryPositions.of(None, recording.length, "cuda")
    layout = Layout(queries, queries, documents=Documents(None, None, queries))
    with replay_topk([recording]), open_carrier() as carrier:
        carrier.replay.check(layout, 1, TOPK, (1,))
        ahead = Ahead(lambda name: carrier.replay._decode(name, queries, 1, TOPK), left.device)

        def products():
            for _ in range(20):
                left @ left

        def beside():
            ahead.begin(LAYER)
            products()
            return ahead.take(LAYER)

        def before():
            ahead.begin(LAYER)
            ahead.take(LAYER)
            products()

        found = beside().topk_indices[0, TOPK:].cpu()
        if not torch.equal(found, expected):
            sys.exit("keys decoded beside the model are others")
        times = ", ".join(
            f"{name} {do_bench(run):.2f} ms"
            for name, run in (("alone", products), ("beside", beside), ("before", before))
        )
    print(f"            matrix products: {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.4, 0.65, 0.83, 0.95])
    args = parser.parse_args()
    for share in args.shares:
        recording = measure(args.length, share)
        if torch.cuda.is_available():
            decode(recording)


if __name__ == "__main__":
    main()
