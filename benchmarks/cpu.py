"""Time and memory of one sparse attention on the CPU: the plugin beside megatron-core 0.16 to 0.18.

    python benchmarks/cpu.py [--lengths 1024 2048 4096]

Forward and backward of one layer's core in fp32: 8 heads of 192 + 64 and values of 256, latent 512,
top-k 512, keys and values made of the latent. Each figure is of a process of its own, the median of
3 runs; memory is what its peak resident size grew by. One thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time

HEADS, TOPK = 8, 512
PLUGIN = "plugin (torch)"


def measure(who: str, length: int) -> dict[str, float]:
    """In this process: seconds, and GiB."""
    import torch
    from megatron.core.transformer.experimental_attention_variant.dsa import unfused_dsa_fn

    from glm5_patch.ops.query_positions import QueryPositions, visible_topk
    from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
    from glm5_patch.ops.sparse_attention.reference import keys_and_values, sparse_attention

    torch.set_num_threads(1)
    dims = MLADims(latent=512, nope=192, rope=64, value=256)
    queries = QueryPositions(torch.zeros(length, dtype=torch.int64), longest=length)
    scores = torch.rand(length, length).tril().add(torch.zeros(length, length).triu(1) - 1)
    topk = scores.topk(TOPK)[1].int()[None]
    topk[:, :TOPK] = visible_topk(queries, 1)[:, :TOPK, :TOPK]
    del scores
    shapes = [
        (length, 1, HEADS, dims.nope + dims.rope),
        (length, 1, 1, dims.latent + dims.rope),
        (dims.latent, HEADS * (dims.nope + dims.value)),
    ]
    inputs = [(torch.randn(shape) / shape[0] ** 0.25).requires_grad_() for shape in shapes]

    def step():
        attention = AttentionInputs(*inputs, topk, queries, dims, 0.0625)
        if who == PLUGIN:
            output, _ = sparse_attention(attention)
        else:
            key, value = keys_and_values(attention)
            output = unfused_dsa_fn(inputs[0], key, value, topk.long().clamp_min(0), 0.0625)
        return torch.autograd.grad(output.square().mean(), inputs)

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before, times = peak(), []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "gib": peak() - before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return 0
    host = f"megatron-core {importlib.metadata.version('megatron-core')}"
    for length in options.lengths:
        for who in (PLUGIN, host):
            command = [sys.executable, "-W", "ignore", __file__, "--one", who, str(length)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
            found = json.loads(result.stdout)
            print(f"{length:6} {who:22} {found['seconds']:7.2f} s  {found['gib']:6.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
