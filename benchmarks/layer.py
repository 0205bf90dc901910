"""What index sharing saves: decoder layers of GLM-5.2's shape on one GPU, every layer computing its
top-k or one of four, and a training step on fused and on blocked kernels.

    python benchmarks/layer.py [--lengths 8192 16384] [--output DIR]

Four dense layers (hidden size 6144, 64 heads, latent 512, index_topk 2048; the published model has
three such and 75 MoE ones) with a small vocabulary, bf16, batch 1, random weights, modules of the
local backend, full recompute. "forward" is without gradients; "step" is a forward and backward of
one microbatch under full recompute. A figure is the median of 5 runs, divided by the layers; memory
is the peak of the process, weights and gradients included. Writes layer.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import record
import torch

import glm5_patch
from glm5_patch.cpu_host import single_process
from glm5_patch.model.build import gpt_model, transformer_config
from glm5_patch.model.hf_config import HFConfig

LAYERS, RUNS = 4, 5
PATTERNS = {"every layer computes": "FFFF", "one of four computes": "FSSS"}
BLOCKED_UP_TO = 8192
"""Tokens for which the blocked torch code is timed too; it is quadratic."""


def build(pattern: str):
    hf = HFConfig(
        {
            "model_type": "glm_moe_dsa",
            "num_hidden_layers": LAYERS,
            "first_k_dense_replace": LAYERS,
            "indexer_types": ["full" if kind == "F" else "shared" for kind in pattern],
            "num_nextn_predict_layers": 0,
            "vocab_size": 1024,
        }
    )
    config = transformer_config(
        hf,
        transformer_impl="local",
        params_dtype=torch.bfloat16,
        bf16=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return gpt_model(hf, config)


def seconds(run) -> float:
    run()
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(model, length: int) -> dict[str, float]:
    ids = torch.randint(1024, (1, length), device="cuda")
    positions = torch.arange(length, device="cuda")[None]

    def forward():
        with torch.no_grad():
            model(ids, positions, None)

    def step():
        model.zero_grad()
        model(ids, positions, None).float().square().mean().backward()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = {}
    for name, run in (("forward", forward), ("step", step)):
        model.train(name == "step")
        found[f"{name}_ms"] = seconds(run) * 1e3 / LAYERS
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/layer.py needs a CUDA device", file=sys.stderr)
        return 2
    glm5_patch.require()
    rows = []
    with single_process("cuda"):
        for label, pattern in PATTERNS.items():
            model = build(pattern)
            for length in options.lengths:
                for kernels in ("triton", "torch") if length <= BLOCKED_UP_TO else ("triton",):
                    os.environ["GLM5_PATCH_KERNELS"] = kernels
                    row = {"layers": label, "length": length, "kernels": kernels}
                    rows.append({**row, **measure(model, length)})
                    print(
                        "{layers:22} {length:6} {kernels:7} forward {forward_ms:8.2f} ms, "
                        "step {step_ms:8.2f} ms a layer, {peak_gib:.1f} GiB".format(**rows[-1]),
                        flush=True,
                    )
            del model
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "layer.json"
    record.write(path, rows=rows)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
