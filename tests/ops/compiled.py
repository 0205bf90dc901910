"""Compile every kernel, Triton's and Gluon's, at GLM-5.2's shapes for a GPU that is not there.

    python -m tests.ops.compiled 89 101376

takes the compute capability and the bytes of shared memory that a program may take there, and
prints a line of JSON for each kernel: its name and the bytes that it takes. Run it in a process of
its own, without Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

from glm5_patch.ops import tiles
from glm5_patch.ops.index_loss import gluon as gluon_loss
from glm5_patch.ops.index_loss import triton as index_loss
from glm5_patch.ops.index_loss.reference import LossSettings
from glm5_patch.ops.index_topk import gluon as gluon_index_topk
from glm5_patch.ops.index_topk import triton as index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.quantization import triton as quantization
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.recorded_keys import triton as recorded_keys
from glm5_patch.ops.recorded_keys.frame import Frame
from glm5_patch.ops.rotation import triton as rotation
from glm5_patch.ops.rotation.reference import Rotation
from glm5_patch.ops.sparse_attention import gluon as gluon_attention
from glm5_patch.ops.sparse_attention import triton as sparse_attention
from glm5_patch.ops.sparse_attention import unions
from glm5_patch.ops.sparse_attention.inputs import AbsorbedInputs

LATENT, NOPE, ROPE, VALUE, TOPK = 512, 192, 64, 256, 2048
S, KEYS = 2, 16384
"""Queries, the last ones, and keys: enough that selection takes candidates."""


class Driver:
    """Of a GPU of some compute capability, on which nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(capability: int, shared_memory: int) -> None:
    found: dict[str, dict] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.fn.__name__
        if isinstance(self, GluonJITFunction):
            name = f"gluon_{name}"
        number = sum(key.split("-")[0] == name for key in found)
        found[f"{name}-{number}"] = {"shared": kernel.metadata.shared}

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(capability))
    chosen = tiles.choose(divmod(capability, 10), shared_memory)
    tiles.of_device = lambda device: chosen
    for heads in (64, 16, 8):
        _attention(heads, sparse_attention, index_loss)
    if capability == 90:
        _attention(64, gluon_attention, gluon_loss)
        _one_pass()
        for heads in (32, 16, 8):
            _unions(heads)
        in_step = torch.zeros(1, dtype=torch.int64), 132
        gluon_attention.progress_for = lambda latent: in_step
        _attention(64, gluon_attention, gluon_loss)
        _unions(16)
    _indexer()
    _recorded_keys()
    for name, figures in found.items():
        print(json.dumps({"kernel": name, **figures}), flush=True)


def _half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def _absorbed(heads: int) -> AbsorbedInputs:
    places = torch.arange(KEYS - S, KEYS)
    queries = QueryPositions(torch.zeros_like(places), places, KEYS, KEYS)
    topk = torch.zeros((1, S, TOPK), dtype=torch.int32)
    query, latent = _half(S, 1, heads, LATENT + ROPE), _half(KEYS, 1, LATENT + ROPE)
    return AbsorbedInputs(query, latent, topk, *queries.spans(), LATENT, 0.1)


def _unions(heads: int) -> None:
    absorbed, rows = _absorbed(heads), torch.zeros(S, 1, heads)
    out = _half(S, 1, heads, LATENT)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        unions.key_gradients(absorbed, rows, rows, out)
    torch.use_deterministic_algorithms(False)


def _attention(heads: int, kernels, loss_kernels) -> None:
    absorbed = _absorbed(heads)
    query = absorbed.query
    plain = _half(S, 1, heads, NOPE + ROPE)
    up = _half(LATENT, heads * (NOPE + VALUE)).unflatten(-1, (heads, -1))
    sparse_attention.project(plain, up[..., :NOPE].permute(1, 2, 0), query, copied=ROPE)
    out, lse = kernels.forward(absorbed)
    values = _half(S, 1, heads, VALUE)
    sparse_attention.project(out, up[..., NOPE:].transpose(0, 1), values)
    kernels.backward(absorbed, out, lse, out)
    loss_kernels.head_sums(absorbed, lse)
    if loss_kernels is index_loss:
        index_loss.head_sums(absorbed, None)
    by = Rotation(_half(S, ROPE), _half(S, ROPE), True)
    rotation.rotate(plain[:, :, None].requires_grad_(), by, NOPE).sum().backward()
    if heads == 64:
        torch.use_deterministic_algorithms(True)
        kernels.backward(absorbed, out, lse, out)
        torch.use_deterministic_algorithms(False)


def _indexer() -> None:
    places = torch.arange(KEYS - S, KEYS)
    queries = QueryPositions(torch.zeros_like(places), places, KEYS, KEYS)
    inputs = IndexerInputs(_half(S, 1, 32, 128), _half(KEYS, 1, 128), torch.zeros(S, 1, 32))
    quantization.quantize(inputs.query, True)
    scores = index_topk.index_scores(inputs, queries, slice(0, S), 0.1)
    for longest in (KEYS, 4096):
        index_topk.selection(scores[0], *queries.spans(), longest, TOPK)
    target = torch.zeros((1, S, TOPK))
    topk = torch.zeros((1, S, TOPK), dtype=torch.int32)
    settings = LossSettings(0.1, 1.0, sparse=True)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        index_loss.loss_of_target(inputs, index_loss.SelectedKeys(topk, queries), target, settings)
    torch.use_deterministic_algorithms(False)


def _one_pass() -> None:
    rows, keys = 16, 2 * KEYS  # on the CPU, which counts as one processor, no fewer queries
    places = torch.arange(keys - rows, keys)
    queries = QueryPositions(torch.zeros_like(places), places, keys, keys)
    for heads in (32, 64):
        query, weights = _half(rows, 1, heads, 128), torch.zeros(rows, 1, heads)
        inputs = IndexerInputs(query, _half(keys, 1, 128), weights)
        gluon_index_topk.index_scores(inputs, queries, slice(0, rows), 0.1)
        gluon_index_topk.index_topk(inputs, queries, TOPK, 0.1)


def _recorded_keys() -> None:
    keys = np.stack([np.arange(row, row + TOPK) for row in range(3)])
    frame = Frame.encode(KEYS, keys).unpack()
    recorded_keys.recorded_keys([frame], torch.arange(3), TOPK, "cpu")


if __name__ == "__main__":
    compile_all(*map(int, sys.argv[1:]))
