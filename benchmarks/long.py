"""The longest sequence that one GPU trains: seven dense layers of GLM-5.2's width, full recompute.

    python benchmarks/long.py [--length 262144] [--layers 7] [--offload]

The layers have hidden size 6144, 64 heads, index_topk 2048 and GLM-5.2's index schedule (FFFSSSF);
the model has 1024 words, random weights and gradients in bf16, and no optimizer. A step is one
forward and backward of one sequence. The last of --steps is printed, since the first one compiles
and allocates. TFLOP/s are without the recompute, as ``flops`` counts them.

``--offload`` sets ``dsa_topk_offload``, and keeps the inputs of recomputed layers in host memory as
well (``torch.autograd.graph.save_on_cpu``).

Then it checks the attention core at this length on random inputs, unless --no-check is given:

- "rows": output and query gradient of 16 queries, from the keys and values of each head in fp32;
- "kernels": output and gradients of all queries, the latent and the up-projection, from torch
  operations that compute in fp32;
- "blocks": the gradients of the first 8192 queries in four blocks, from those in one block.

It prints relative errors, and fails if one is above its bound or if the loss is not finite.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

# The allocator reads it once: blocks of many sizes leave no holes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import flops
import torch
from random_topk import random_topk
from splits.model import Shape, inputs_kept
from torch import Tensor

import glm5_patch
from glm5_patch import env
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.sparse_attention import absorption
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.testing.cpu_host import single_process

VOCABULARY = 1024
BOUNDS = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
"""Relative errors; of bf16 a few roundings."""
ROWS, SHORT = 16, 8192


def config_of(options) -> HFConfig:
    shape = Shape(layers=options.layers, experts=0, vocabulary=VOCABULARY)
    return shape.config(on_cpu=options.device == "cpu")


def build(hf: HFConfig, options, dtype: torch.dtype):
    on_cpu = options.device == "cpu"
    config = transformer_config(
        hf,
        transformer_impl="local",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        bias_activation_fusion=not on_cpu,  # it would be compiled
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        dsa_topk_offload=options.offload,
    )
    return gpt_model(hf, config).train()


def step(model, length: int, options) -> dict[str, float]:
    """One forward and backward; seconds, loss, and GiB at the peaks."""
    on_cpu = options.device == "cpu"
    synchronize = (lambda: None) if on_cpu else torch.cuda.synchronize
    peak = (lambda: 0.0) if on_cpu else (lambda: torch.cuda.max_memory_allocated() / 2**30)
    ids = torch.randint(VOCABULARY, (1, length), device=options.device)
    positions = torch.arange(length, device=options.device)[None]
    model.zero_grad()
    synchronize()
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with inputs_kept(options.offload, options.device):
        loss = model(ids, positions, None, labels=ids.roll(-1, 1)).float().mean()
    synchronize()
    found = {"forward_gib": peak()}
    loss.backward()
    synchronize()
    return {**found, "seconds": time.perf_counter() - start, "gib": peak(), "loss": loss.item()}


class Core(NamedTuple):
    """Random inputs of the attention core, as ``AttentionInputs`` has them, and the gradient of its
    output."""

    tensors: list[Tensor]
    topk_indices: Tensor
    dims: MLADims
    d_output: Tensor

    @classmethod
    def random(cls, hf: HFConfig, length: int, device: str, dtype: torch.dtype) -> Core:
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=draw, device=device, dtype=dtype).mul_(scale)

        heads, dims = hf.num_attention_heads, dims_of(hf)
        tensors = [
            normal(length, 1, heads, dims.nope + dims.rope),
            normal(length, 1, 1, dims.latent + dims.rope),
            normal(dims.latent, heads * (dims.nope + dims.value), scale=dims.latent**-0.5),
        ]
        topk = random_topk(length, hf.index_topk, draw)
        return cls(tensors, topk, dims, normal(length, 1, heads * dims.value))

    def first(self, rows: int) -> Core:
        """Of the first queries, and the keys that they see."""
        query, latent, up_projection = self.tensors
        tensors = [query[:rows], latent[:rows], up_projection]
        return self._replace(
            tensors=tensors,
            topk_indices=self.topk_indices[:, :rows],
            d_output=self.d_output[:rows],
        )

    @property
    def scale(self) -> float:
        return (self.dims.nope + self.dims.rope) ** -0.5

    def run(self) -> list[Tensor]:
        """The output, and the gradients of query, latent and up-projection."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        length, device = len(leaves[0]), leaves[0].device
        starts = torch.zeros(length, dtype=torch.int64, device=device)
        queries = QueryPositions(starts, longest=length)
        attention = AttentionInputs(*leaves, self.topk_indices, queries, self.dims, self.scale)
        output, _ = absorption.absorbed_attention(attention)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.d_output)]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Output and query gradient of some queries, fp32, with the keys and values of each head
        in memory."""
        dims = self.dims
        query = self.tensors[0][rows, 0].float().requires_grad_()  # [rows, n, nope + rope]
        chosen = self.topk_indices[0, rows]  # [rows, k]
        latent = self.tensors[1][chosen.clamp_min(0), 0, 0].float()  # [rows, k, latent + rope]
        made = latent[..., : dims.latent] @ self.tensors[2].float()
        key, value = made.unflatten(-1, (-1, dims.nope + dims.value)).split(
            [dims.nope, dims.value], dim=-1
        )  # [rows, k, n, nope], [rows, k, n, value]
        logits = torch.einsum("rnd,rknd->rnk", query[..., : dims.nope], key)
        rotary = torch.einsum("rnd,rkd->rnk", query[..., dims.nope :], latent[..., dims.latent :])
        logits = ((logits + rotary) * self.scale).masked_fill(chosen[:, None] < 0, float("-inf"))
        output = torch.einsum("rnk,rknd->rnd", logits.softmax(-1), value).flatten(1)
        d_output = self.d_output[rows, 0].float()
        return output.detach(), *torch.autograd.grad(output, query, d_output)


def dims_of(hf: HFConfig) -> MLADims:
    return MLADims(hf.kv_lora_rank, hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim)


def check_core(core: Core) -> Iterator[tuple[str, float]]:
    """What was compared, and the relative error."""
    names = "output", "query", "latent", "up-projection"
    length = len(core.d_output)
    found = core.run()
    draw = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.randint(length, (ROWS - 1,), generator=draw), torch.tensor([-1])])
    for name, ours, theirs in zip(names, found, core.rows(rows.to(core.d_output.device))):
        yield f"rows, {name}", relative(ours[rows, 0], theirs)
    with mock.patch.dict(os.environ, {env.KERNELS: "torch"}):
        reference = core.run()
    for name, ours, theirs in zip(names, found, reference):
        yield f"kernels, {name}", relative(ours, theirs)
    del found, reference
    short = core.first(min(length, SHORT))
    one_block = short.run()
    bytes_of_a_query = short.tensors[0][0, 0, :, 0].numel() * short.tensors[0].element_size()
    bytes_of_a_query *= core.dims.latent + core.dims.rope
    a_quarter = len(short.d_output) // 4 * bytes_of_a_query
    with (
        mock.patch.object(absorption, "ABSORBED_BYTES", a_quarter),
        mock.patch.object(absorption, "KEPT_BYTES", 0),
        mock.patch.object(absorption, "BLOCK_ROWS", 1),
    ):
        four_blocks = short.run()
    for name, ours, theirs in zip(names, four_blocks, one_block):
        yield f"blocks, {name}", relative(ours, theirs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """In the Frobenius norm, of parts: a whole one in fp32 takes as much memory again, twice."""
    difference = of = 0.0
    for a, b in zip(ours.split(4096), theirs.split(4096)):
        difference += (a.float() - b.float()).square().sum(dtype=torch.float64)
        of += b.float().square().sum(dtype=torch.float64)
    return (difference / of).sqrt().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--length", type=int, default=262144, help="tokens of the sequence")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--offload", action="store_true", help="top-k and inputs to host memory")
    parser.add_argument("--steps", type=int, default=2, help="the last one is printed")
    parser.add_argument("--no-check", action="store_true", help="leave out the checks of the core")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, fp32")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/long.py needs a CUDA device, or --device cpu", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    glm5_patch.require()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    hf, length, wrong = config_of(options), options.length, []
    with single_process(options.device):
        model = build(hf, options, dtype)
        for _ in range(options.steps):
            found = step(model, length, options)
        del model
    pattern = "".join("F" if kind == "full" else "S" for kind in hf.schedule.types)
    rate = flops.rates(hf, length, length / found["seconds"])
    print(f"{length} tokens, {options.layers} dense layers ({pattern}), full recompute: ", end="")
    print("loss {loss:.3f}, {seconds:.2f} s a step, ".format(**found), end="")
    print(f"{length / found['seconds']:.0f} tokens/s, ", end="")
    print("".join(f"{value:g} {name}, " for name, value in rate.items()), end="")
    print("{forward_gib:.1f} GiB after the forward, {gib:.1f} GiB in all".format(**found))
    if not torch.tensor(found["loss"]).isfinite():
        wrong.append("the loss")
    if not options.no_check:
        if options.device == "cuda":
            torch.cuda.empty_cache()
        for what, error in check_core(Core.random(hf, length, options.device, dtype)):
            print(f"{what:24} {error:.1e}", flush=True)
            if not error <= BOUNDS[dtype]:
                wrong.append(what)
    if wrong:
        print(f"above {BOUNDS[dtype]:.0e} or not finite: {', '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
