"""What is alive at the memory peak of benchmarks/long.py, counted without a GPU.

    python benchmarks/alive.py [--length 262144] [--layers 7] [--offload]

The step runs on torch's meta device, whose tensors have shapes and no data, and every storage is
counted while it lives. What kernels compute on a GPU is replaced by their results' shapes. Not
counted: workspaces of libraries, scores of the selection, and what the allocator can't use.
Prints the peak of the forward, the peak in all, and the kinds of tensors that are largest there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import weakref
from collections import Counter
from unittest import mock

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from long import build, config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import glm5_patch
from glm5_patch.ops.index_topk import operation as selection
from glm5_patch.ops.rotation import operation as rotation
from glm5_patch.ops.sparse_attention import absorption
from glm5_patch.ops.sparse_attention import operation as attention
from glm5_patch.testing.cpu_host import single_process
from glm5_patch.topk import offload

GIB = 2**30


class Alive(TorchDispatchMode):
    """Counts the storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[int, tuple]] = {}
        self._bytes = self.peak = 0
        self.kinds = Counter()
        """At the peak: bytes by shape and dtype."""

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        size = storage.nbytes()
        self._storages[storage._cdata] = size, (tuple(tensor.shape), tensor.dtype)
        weakref.finalize(storage, self._forget, storage._cdata)
        self._bytes += size
        if self._bytes > self.peak:
            self.peak, self.kinds = self._bytes, Counter()
            for size, kind in self._storages.values():
                self.kinds[kind] += size

    def _forget(self, key: int) -> None:
        self._bytes -= self._storages.pop(key)[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(found, Tensor):
                self.see(found)
        return result


class _LikeInput(torch.autograd.Function):
    """An operation that keeps what its backward needs, and nothing else: [...] -> ``shape``."""

    @staticmethod
    def forward(ctx, tensor, shape, kept):
        ctx.shape = tensor.shape
        ctx.save_for_backward(*kept)
        return tensor.new_empty(shape)

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors
        return gradient.new_empty(ctx.shape), None, None


def _rotated(name, call, tensor: Tensor, *_) -> Tensor:
    s, b, groups, heads, width = tensor.shape
    return _LikeInput.apply(tensor, (s, b, groups * heads, width), ())


def _passes(name, call, absorbed, *_) -> tuple[Tensor, Tensor]:
    query, latent = absorbed.query, absorbed.latent
    if name.endswith("forward"):
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        return query.new_empty((*query.shape[:3], absorbed.latent_dim)), lse
    return torch.empty_like(query), torch.empty_like(latent, dtype=torch.float32)


def _selected(name, call, inputs, queries, k: int, scale: float) -> Tensor:
    s, b = inputs.query.shape[:2]
    return inputs.query.new_empty((b, s, k), dtype=torch.int32)


def _put(memory: offload.HostMemory, layer_number: int, topk_indices: Tensor) -> None:
    memory._kept[layer_number] = _shape_and_dtype(topk_indices), topk_indices.device


def _arriving(shape_and_dtype, device: torch.device) -> offload._Arriving:
    return offload._Arriving(_on_meta(shape_and_dtype), None)


def _shape_and_dtype(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _on_meta(shape_and_dtype: tuple[torch.Size, torch.dtype]) -> Tensor:
    shape, dtype = shape_and_dtype
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def shapes_alone():
    """Operations that kernels compute on a GPU, as the shapes of their results."""
    from megatron.core.fusions import fused_bias_swiglu as swiglu

    def norm(module: torch.nn.RMSNorm, tensor: Tensor) -> Tensor:
        return _LikeInput.apply(tensor, tensor.shape, (tensor,))

    replaced = (
        (attention, "compute", lambda name, call, given: absorption.absorbed_attention(given)),
        (absorption, "compute", _passes),
        (absorption.triton, "project", lambda *_, **__: None),
        (rotation, "compute", _rotated),
        (selection, "compute", _selected),
        (offload.HostMemory, "put", _put),
        (offload, "_arriving", _arriving),
        (torch.nn.RMSNorm, "forward", norm),
        (swiglu, "swiglu", lambda y: y.new_empty((*y.shape[:-1], y.shape[-1] // 2))),
        (swiglu, "swiglu_back", lambda gradient, y: torch.empty_like(y)),
    )
    with contextlib.ExitStack() as undo:
        for owner, name, instead in replaced:
            undo.enter_context(mock.patch.object(owner, name, instead))
        yield


def count(options) -> tuple[float, Alive]:
    """One forward and backward: the peak of the forward in GiB, and what was counted."""
    hf, alive = config_of(options), Alive()
    with single_process("meta"), shapes_alone(), torch.device("meta"):
        model = build(hf, options, torch.bfloat16)
        inputs_kept = contextlib.nullcontext()
        if options.offload:
            inputs_kept = torch.autograd.graph.saved_tensors_hooks(_shape_and_dtype, _on_meta)
        with alive:
            for parameter in model.parameters():
                alive.see(parameter)
            ids = torch.zeros((1, options.length), dtype=torch.int64)
            with inputs_kept:
                loss = model(ids, ids, None, labels=ids).float().mean()
            forward_gib = alive.peak / GIB
            loss.backward()
    return forward_gib, alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--length", type=int, default=262144, help="tokens of the sequence")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--offload", action="store_true", help="as of benchmarks/long.py")
    options = parser.parse_args()
    options.device = "meta"
    glm5_patch.require()
    forward_gib, alive = count(options)
    print(f"{forward_gib:.1f} GiB in the forward, {alive.peak / GIB:.1f} GiB in all; then:")
    for (shape, dtype), size in alive.kinds.most_common(12):
        print(f"{size / GIB:8.2f} GiB  {str(dtype).removeprefix('torch.')} {list(shape)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
