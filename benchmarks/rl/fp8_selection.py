"""The selection in fp8 by each backend that can compute it here: keys and milliseconds. On a GPU.

    python benchmarks/rl/fp8_selection.py [--lengths 8192 16384]

GLM-5's indexer, 32 heads of 128, top-k 2048. It prints milliseconds of the selection in bf16, and
of the rounding to fp8 alone. For each backend it prints milliseconds; of the queries that see more
than 2048 keys, the share of keys that are those of bf16; and the share that are those of the
package's own kernels in fp8, how far below the lowest selected score the others are at most, as a
share of the highest score, and whether a document that stands behind another in a pack has the same
keys as alone. It exits with 1 if a backend is off by more than is allowed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from triton.testing import do_bench

from glm5_patch.ops.index_topk.fp8 import fp8_inputs, shortfall
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call
from glm5_patch.ops.query_positions import QueryPositions, document_starts
from glm5_patch.ops.registry import backends, why_not
from glm5_patch.testing.parity import kept_share

HEADS, DIM, TOPK, OTHER = 32, 128, 2048, 1000
SCALE = DIM**-0.5


def inputs(length: int) -> IndexerInputs:
    """Of random tokens of several sizes, bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device="cuda")
    size = draw(length, 1, 1).mul(0.5).exp()
    return IndexerInputs(
        draw(length, 1, HEADS, DIM).bfloat16(),
        (draw(length, 1, DIM) * size).bfloat16(),
        draw(length, 1, HEADS) * HEADS**-0.5,
    )


def measure(length: int) -> bool:
    """Print; return whether every backend agrees."""
    given, agree = inputs(length), True
    alone = QueryPositions.of(None, length, "cuda")
    in_bf16 = index_topk(given, alone, TOPK, SCALE)
    took = do_bench(lambda: index_topk(given, alone, TOPK, SCALE), warmup=500)  # clocks go up
    rounding = do_bench(lambda: fp8_inputs(given, SCALE))
    print(f"{length} tokens: in bf16 {took:.2f} ms; rounding to fp8 {rounding:.2f} ms")
    bounds = [0, OTHER, OTHER + length]
    packed = QueryPositions(document_starts(bounds, "cuda"), longest=length)
    behind = IndexerInputs(*(torch.cat([part[:OTHER], part]) for part in given))
    (own,) = (one for one in backends("index_topk.fp8") if one.name == "torch")
    expected = own.compute(given, alone, TOPK, SCALE, True)
    call = Call(torch.device("cuda"), torch.bfloat16, given.call.widths)
    for one in backends("index_topk.fp8"):
        if reason := why_not(one, call):
            print(f"  {one.name}: {reason}")
            continue
        found = one.compute(given, alone, TOPK, SCALE, True)
        off = shortfall(found, expected, given, alone, TOPK, SCALE, True)
        in_pack = one.compute(behind, packed, TOPK, SCALE, True)[:, OTHER:]
        took = do_bench(lambda one=one: one.compute(given, alone, TOPK, SCALE, True))
        as_bf16 = kept_share(found[:, TOPK:], in_bf16[:, TOPK:])
        print(
            f"  {one.name}: {took:.2f} ms; {100 * as_bf16:.2f} % of the keys are those of bf16, "
            f"{100 * kept_share(found, expected):.3f} % the package's own in fp8, the others off "
            f"by at most {off:.1e}; the same in a pack: {torch.equal(in_pack, found)}",
            flush=True,
        )
        agree &= off <= (one.most_difference or 0.0)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    sys.exit(not all([measure(length) for length in parser.parse_args().lengths]))


if __name__ == "__main__":
    main()
