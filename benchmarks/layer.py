"""What index sharing saves: decoder layers of GLM-5.2's shape on one GPU, every layer computing its
top-k or one of four, and a training step on fused kernels, on blocked ones and as released.

    python benchmarks/layer.py [--lengths 8192 16384] [--kernels triton cudnn] [--output DIR]

Four dense layers (hidden size 6144, 64 heads, latent 512, index_topk 2048; the published model has
three such and 75 MoE ones) with a small vocabulary, bf16, batch 1, random weights, modules of the
local backend, full recompute, SwiGLU in one kernel as Megatron-LM's scripts have it. "forward" is
without gradients; "step" is a forward and backward of one microbatch under full recompute.
"released" has megatron-core 0.16's own attention and indexer under the same layers, which computes
the indexer's loss in every training step; its dispatcher, which refuses such layers, is told to
build them, and its Hadamard rotation, which needs another package, is a matrix product. A figure is
the median of 5 runs, divided by the layers; memory is the peak of the process, weights and
gradients included. TFLOP/s are those of a step without its recompute, as ``flops`` counts them.

One more step says where a step's time goes, by the kernels that torch's profiler saw, see
``splits.phases``: how many kernels a layer launches, and how long the rest takes, the kernels that
are no products, no attention and no selection. At the rate of a copy, measured here, they move so
many GB at most. Writes layer.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import flops
import record
import torch
from splits import phases

import glm5_patch
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.ops.needs import Call
from glm5_patch.ops.registry import libraries, why_not
from glm5_patch.testing.cpu_host import single_process

LAYERS, RUNS = 4, 5
PATTERNS = {"every layer computes": "FFFF", "one of four computes": "FSSS"}
KERNELS = ("triton", "torch", "cudnn", "released")
"""Of ``GLM5_PATCH_KERNELS``, "cudnn" where it is installed; and what megatron-core has."""
QUADRATIC_UP_TO = 8192
"""Tokens for which the blocked torch code and the host's own are timed too; both are quadratic."""


def build(pattern: str, **settings):
    hf = HFConfig(
        {
            "model_type": "glm_moe_dsa",
            "num_hidden_layers": LAYERS,
            "first_k_dense_replace": LAYERS,
            "indexer_types": ["full" if kind == "F" else "shared" for kind in pattern],
            "num_nextn_predict_layers": 0,
            "vocab_size": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
        }
    )
    config = transformer_config(
        hf,
        transformer_impl="local",
        params_dtype=torch.bfloat16,
        bf16=True,
        bias_activation_fusion=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        **settings,
    )
    return hf, gpt_model(hf, config)


@contextlib.contextmanager
def as_released():
    """Build megatron-core's own DSA layers, and run them."""
    from megatron.core.transformer.experimental_attention_variant import dsa
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from glm5_patch.attention import spec
    from glm5_patch.patches import built

    glm5_spec = spec.glm5_attention_spec

    def host_spec(found, config, backend):
        ours = glm5_spec(found, config, backend)
        return dataclasses.replace(
            ours,
            module=MLASelfAttention,
            submodules=dataclasses.replace(
                ours.submodules, core_attention=found.submodules.core_attention
            ),
        )

    def rotate(x):
        matrix = torch.ones(1, 1, device=x.device, dtype=x.dtype)
        while len(matrix) < x.shape[-1]:
            matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], 1)
        return x @ (matrix * x.shape[-1] ** -0.5)

    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.object(spec, "glm5_attention_spec", host_spec))
        undo.enter_context(mock.patch.object(dsa, "rotate_activation", rotate))
        # It refuses what is measured here.
        undo.enter_context(mock.patch.object(built, "raise_unless_right", lambda *_: None))
        yield


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


def copy_rate() -> float:
    """Bytes a second that a large copy on the GPU reads and writes."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def measure(model, hf: HFConfig, length: int, rate: float) -> dict[str, float]:
    """Of a layer.

    Args:
        model, hf: the layers.
        length: tokens.
        rate: of a copy, bytes a second.
    """
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
    found["step_tflops"] = flops.training_flops(hf, length) / LAYERS / found["step_ms"] / 1e9
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    step_ms = found["step_ms"] * LAYERS
    budget = phases.breakdown(phases.profiled(step, ()), step_ms)
    for name in ("products", "attention", "selection", "rest"):
        found[f"{name}_ms"] = budget[f"{name} ms"] / LAYERS
    found["rest_gb"] = found["rest_ms"] * rate / 1e12
    found["launches"] = budget["launches"] / LAYERS
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/layer.py needs a CUDA device", file=sys.stderr)
        return 2
    glm5_patch.require()
    rows, rate = [], copy_rate()

    def add(hf: HFConfig, model, layers: str, length: int, kernels: str) -> None:
        rows.append({"layers": layers, "length": length, "kernels": kernels})
        try:
            rows[-1].update(measure(model, hf, length, rate))
        except torch.OutOfMemoryError:
            print("{layers:22} {length:6} {kernels:8} out of memory".format(**rows[-1]), flush=True)
            return
        print(
            "{layers:22} {length:6} {kernels:8} forward {forward_ms:8.2f} ms, "
            "step {step_ms:8.2f} ms a layer ({step_tflops:.0f} TFLOP/s), {peak_gib:.1f} GiB; "
            "{launches:.0f} launches: products {products_ms:.1f} ms, attention {attention_ms:.1f}, "
            "selection {selection_ms:.1f}, rest {rest_ms:.1f} (at most {rest_gb:.1f} GB)".format(
                **rows[-1]
            ),
            flush=True,
        )

    short = [length for length in options.lengths if length <= QUADRATIC_UP_TO]
    runs = {"triton": options.lengths, "torch": short}
    call = Call(torch.device("cuda"), torch.bfloat16)
    if any(one.name == "cudnn" and why_not(one, call) is None for one in libraries()):
        runs["cudnn"] = options.lengths
    elif "cudnn" in options.kernels and options.kernels is not KERNELS:
        parser.error("--kernels cudnn needs cuDNN's frontend: pip install nvidia-cudnn-frontend")
    runs = {kernels: lengths for kernels, lengths in runs.items() if kernels in options.kernels}
    with single_process("cuda"):
        for layers, pattern in PATTERNS.items():
            hf, model = build(pattern)
            for kernels, lengths in runs.items():
                os.environ["GLM5_PATCH_KERNELS"] = kernels
                for length in lengths:
                    add(hf, model, layers, length, kernels)
            del model
        released = glm5_patch.status()["dsa_spec"].state == "applied"
        if released and "released" in options.kernels:
            with as_released():
                hf, model = build(PATTERNS["every layer computes"], dsa_indexer_loss_coeff=0.0)
                for length in short:
                    add(hf, model, "every layer computes", length, "released")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "layer.json"
    record.write(path, rows=rows, copy_tb_s=rate / 1e12)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
