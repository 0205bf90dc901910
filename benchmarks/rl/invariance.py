"""Whether a query's bits depend on the rest of the batch, on a GPU.

    python benchmarks/rl/invariance.py [--length 4096]

GLM-5's own shape, bf16: heads of 192 + 64 and 256, latent 512 + 64, index heads 32 of 128, top-k
2048. For each backend that can compute here, one document is computed alone, in packs, before other
documents, padded, as the beginning of a longer one, in a batch of two, and as a rank's part of it
(zigzag and contiguous). Top-k, attention output and the index losses of three queries are compared
bit by bit. It prints one line for each backend, and exits with 1 if one differs or fails; a backend
that is not installed is passed over. Then it prints milliseconds of the selection, by kernels that
let equal scores fall as they come beside it, and with many equal scores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from glm5_patch import env
from glm5_patch.ops.index_loss.operation import index_loss
from glm5_patch.ops.index_topk import triton_kernels as kernels
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.query_positions import QueryPositions, document_starts, longest_document
from glm5_patch.ops.registry import backends
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention

DIMS = MLADims(latent=512, nope=192, rope=64, value=256)
HEADS, INDEX_HEADS, INDEX_DIM, TOPK = 64, 32, 128, 2048
BACKENDS = ("triton", "gluon", "flash_mla", "cudnn", "torch")
PADDING = 123


def document(seed: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a document is made of; a longer one begins as a shorter one."""
    found = {}
    shapes = dict(
        query=(HEADS, DIMS.nope + DIMS.rope),
        latent=(1, DIMS.latent + DIMS.rope),
        index_query=(INDEX_HEADS, INDEX_DIM),
        index_key=(INDEX_DIM,),
        weights=(INDEX_HEADS,),
    )
    for number, (name, shape) in enumerate(shapes.items()):
        parts = []
        for block in range(-(-length // 1024)):
            generator = torch.Generator("cuda").manual_seed(1000 * seed + 100 * block + number)
            parts.append(torch.randn((1024, 1, *shape), generator=generator, device="cuda"))
        found[name] = torch.cat(parts)[:length].to(torch.float32 if name == "weights" else dtype)
    return found


class Batch:
    """Documents one after the other; the queries that a rank has of them."""

    def __init__(self, documents, up: Tensor, own: Tensor | None = None, batch: int = 1):
        bounds = [0, *itertools.accumulate(len(d["query"]) for d in documents)]
        together = {n: torch.cat([d[n] for d in documents]) for n in documents[0]}
        if batch > 1:
            together = {n: t.expand(-1, batch, *t.shape[2:]) for n, t in together.items()}
        self.tensors = {n: t.contiguous() for n, t in together.items()}
        starts, longest = document_starts(bounds, "cuda"), longest_document(bounds)
        self.queries, self.up = QueryPositions(starts, longest=longest), up
        if own is not None:
            self.queries = QueryPositions(starts[own], own, len(starts), longest)
        rows = slice(None) if own is None else own
        self.query = self.tensors["query"][rows].contiguous()
        self.inputs = IndexerInputs(
            self.tensors["index_query"][rows].contiguous(),
            self.tensors["index_key"],
            self.tensors["weights"][rows].contiguous() * INDEX_HEADS**-0.5,
        )

    def found(self, rows: Tensor, gradients: bool) -> list[Tensor]:
        """Output of some of its queries, the index loss of three of them, and top-k."""
        topk = None
        if not self.queries.all_fit(TOPK):
            topk = index_topk(self.inputs, self.queries, TOPK, INDEX_DIM**-0.5)
        attention = AttentionInputs(
            self.query.requires_grad_(gradients),
            self.tensors["latent"],
            self.up,
            topk,
            self.queries,
            DIMS,
            (DIMS.nope + DIMS.rope) ** -0.5,
        )
        with torch.set_grad_enabled(gradients):
            output = sparse_attention(attention)[0].detach()
        losses = torch.zeros(len(rows), 1, device="cuda")
        for at in {5, len(rows) // 2, len(rows) - 1}:
            one = rows[at : at + 1]
            inputs = self.inputs._replace(
                query=self.inputs.query[one], weights=self.inputs.weights[one]
            )
            losses[at] = index_loss(
                inputs,
                attention.of_queries(one),
                index_scale=INDEX_DIM**-0.5,
                coefficient=1 / self.query.shape[1],  # equal sequences are added up
                sparse=True,
                per_token=True,
            ).detach()
        return [output[rows, 0], losses, *([] if topk is None else [topk[0, rows]])]


def arrangements(length: int, up: Tensor, dtype) -> Iterator[tuple[str, Batch, Tensor, Tensor]]:
    """Name, batch, which of its queries to look at, and which queries of the document they are."""
    own, other = document(0, length, dtype), document(1, 3001, dtype)
    every = torch.arange(length, device="cuda")
    yield "with gradients", Batch([own], up), every, every
    yield "packed, last", Batch([other, document(2, 77, dtype), own], up), every + 3078, every
    yield "packed, first", Batch([own, other], up), every, every
    padded = {name: torch.cat([t, torch.zeros_like(t[:PADDING])]) for name, t in own.items()}
    real = torch.cat([every, torch.arange(3001, device="cuda") + length + PADDING])
    yield "padded", Batch([padded, other], up, own=real), every, every
    yield "in a longer one", Batch([document(0, length + 1500, dtype)], up), every, every
    yield "batch of two", Batch([own], up, batch=2), every, every
    chunks = (every + 3001).chunk(4)
    for name, part in (
        ("a rank's part, zigzag", torch.cat([chunks[0], chunks[3]])),
        ("a rank's part, contiguous", (every + 3001)[length // 2 + 13 :]),
    ):
        rows = torch.arange(len(part), device="cuda")
        yield name, Batch([other, own], up, own=part), rows, part - 3001


def compare(length: int, dtype: torch.dtype) -> list[str]:
    """What differs from the document alone, in words."""
    width = HEADS * (DIMS.nope + DIMS.value)
    generator = torch.Generator("cuda").manual_seed(0)
    up = torch.randn((DIMS.latent, width), generator=generator, device="cuda")
    up = (up * DIMS.latent**-0.5).to(dtype)
    every = torch.arange(length, device="cuda")
    with torch.no_grad():
        alone = Batch([document(0, length, dtype)], up).found(every, False)
    wrong = []
    for name, batch, rows, at in arrangements(length, up, dtype):
        for what, ours, theirs in zip(
            ("output", "loss", "top-k"), batch.found(rows, name == "with gradients"), alone
        ):
            if what == "loss" and len(at) < length:
                continue  # of other queries
            if not torch.equal(ours, theirs[at]):
                differing = (ours != theirs[at]).flatten(1).any(1).sum().item()
                wrong.append(f"{name}: {what} of {differing} queries")
    return wrong


@contextlib.contextmanager
def without_order_of_equals() -> Iterator[None]:
    """Triton's selection is of kernels that do not look for equals of the lowest selected score.
    They select the same keys for a query that has none."""
    source = Path(kernels.__file__).read_text()
    looks = "if reached > k:"
    assert source.count(looks) == 2, "the kernels have changed"
    package = sys.modules[kernels.__package__]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "without_order_kernels.py")
        path.write_text(source.replace(looks, "if False:"))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        package.triton_kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package.triton_kernels)
        try:
            yield
        finally:
            package.triton_kernels = kernels


def times(length: int) -> None:
    """Milliseconds of selection."""
    whole = Batch([document(0, length, torch.bfloat16)], torch.empty(0, device="cuda"))
    run = lambda inputs: index_topk(inputs, whole.queries, TOPK, INDEX_DIM**-0.5)
    found, ordered, unordered = run(whole.inputs), [], []
    for _ in range(5):  # in turns
        ordered.append(do_bench(lambda: run(whole.inputs)))
        with without_order_of_equals():
            equals = (run(whole.inputs) != found).any(-1).sum().item()
            unordered.append(do_bench(lambda: run(whole.inputs)))
    usual, plain = statistics.median(ordered), statistics.median(unordered)
    print(
        f"top-k, {length} tokens: {usual:.3f} ms; equals as they come: {plain:.3f} ms, "
        f"{100 * (usual / plain - 1):+.1f} % for their order, which decides for {equals} queries"
    )
    keys = whole.inputs.key.clone()
    keys[torch.rand(length, device="cuda") < 0.5] = keys[0].clone()
    equal = do_bench(lambda: run(whole.inputs._replace(key=keys)))
    print(f"half of the keys equal: {equal:.2f} ms")


def is_installed(name: str) -> bool:
    """Whether the package of a backend is."""
    packages = {one.needs.package for one in backends() if one.name == name} - {None}
    return all(importlib.util.find_spec(package) is not None for package in packages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    failed = False
    for name in BACKENDS:
        if not is_installed(name):
            print(f"{name:10} is not installed")
            continue
        dtype, length = torch.bfloat16, args.length
        if name == "torch":
            dtype, length = torch.float32, min(length, 2600)
        os.environ[env.KERNELS] = name
        for tokens in (length, 700):
            try:
                wrong = compare(tokens, dtype)
            except Exception as error:  # the others run
                wrong = [f"{type(error).__name__}: {str(error)[:150]}"]
            failed |= bool(wrong)
            print(f"{name:10} {tokens:6} tokens: {'; '.join(wrong) or 'the same bits'}", flush=True)
    os.environ[env.KERNELS] = "auto"
    times(args.length)
    sys.exit(failed)


if __name__ == "__main__":
    main()
