"""Sparse attention and selection of GLM-5's shape on one GPU: the plugin beside its peers.

    python benchmarks/kernels.py [--lengths 8192 16384] [--heads 64 16] [--parts kernels core]
                                 [--output DIR]

Every kernel is checked before it is timed: attention against fp64 on some rows and its gradients
against dense fp32, the top-k by its values. Then all run in this process on the same tensors: bf16,
batch 1, latent 512 + rotary 64, heads of 192 + 64 and values of 256, top-k 2048 of random causal
keys in ascending order, index heads 32 of 128. Peers are torch, FlashMLA and cuDNN's frontend where
they are installed ("plugin (libraries)" has one of them compute its part), and what the installed
megatron-core has: up to 0.18 its unfused attention, from 0.19 on, with TileLang, its fused one. A
figure is the median of 30 runs or 250 ms, by CUDA events; memory is the peak above what the inputs
take, so the results count. TF counts valid pairs of query and key. Parts are the selection, the
indexer's loss, torch's dense attention, the kernels of attention alone, and its core, absorption
included. Writes kernels.json and kernels.png, and prints kernels.json as a table with --table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import record
import torch
from random_topk import random_topk
from torch import Tensor

from glm5_patch import env
from glm5_patch.ops.index_loss import triton as indexer_loss
from glm5_patch.ops.index_loss.reference import LossSettings
from glm5_patch.ops.index_topk import gluon as gluon_indexer
from glm5_patch.ops.index_topk import triton as indexer
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call
from glm5_patch.ops.query_positions import QueryPositions, selected_keys
from glm5_patch.ops.registry import Backend, backends, choose, why_not
from glm5_patch.ops.sparse_attention import absorption, gluon
from glm5_patch.ops.sparse_attention import triton as sparse_mla
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention as attend
from glm5_patch.ops.sparse_attention.reference import keys_and_values, sparse_attention

DIMS = MLADims(latent=512, nope=192, rope=64, value=256)
SCALE = (DIMS.nope + DIMS.rope) ** -0.5
TOPK, INDEX_HEADS, INDEX_DIM = 2048, 32, 128
FORWARD = 2 * (2 * DIMS.latent + DIMS.rope)  # FLOP of a pair and head, absorbed
BACKWARD = 2 * (5 * DIMS.latent + 3 * DIMS.rope)
KEPT = (0.4, 0.65, 0.85)
"""Shares of its keys that a query has from the one before: as in a trained model."""
PARTS = ("selection", "loss", "dense", "kernels", "core")
DSA = "megatron.core.transformer.experimental_attention_variant"


class Figure(NamedTuple):
    """One measurement."""

    what: str
    who: str
    length: int
    heads: int
    ms: float | None
    """None: out of memory."""
    teraflops: float | None
    gib: float | None


class Batch(NamedTuple):
    """Inputs of one length and number of heads."""

    query: Tensor
    latent: Tensor
    up: Tensor
    topk: Tensor
    queries: QueryPositions
    upstream: Tensor

    def attention(self, *inputs: Tensor) -> AttentionInputs:
        """Of these inputs: queries, latent and up-projection."""
        inputs = inputs or (self.query, self.latent, self.up)
        return AttentionInputs(*inputs, self.topk, self.queries, DIMS, SCALE)

    @property
    def pairs(self) -> int:
        return pairs(len(self.query), TOPK) * self.query.shape[2]


def pairs(length: int, k: int) -> int:
    """Of a query and a key that it attends to, over a causal sequence."""
    short = min(length, k)
    return short * (short + 1) // 2 + (length - short) * k


def random_batch(length: int, heads: int, seed: int = 0) -> Batch:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").mul_(scale).bfloat16()

    up = draw(DIMS.latent, heads * (DIMS.nope + DIMS.value), scale=DIMS.latent**-0.5)
    return Batch(
        draw(length, 1, heads, DIMS.nope + DIMS.rope),
        draw(length, 1, 1, DIMS.latent + DIMS.rope),
        up,
        random_topk(length, TOPK, generator),
        QueryPositions(torch.zeros(length, dtype=torch.int64, device="cuda"), longest=length),
        draw(length, 1, heads * DIMS.value),
    )


def milliseconds(run: Callable[[], object]) -> float:
    """Runs are queued one behind the other: what the CPU needs to launch them does not count."""

    def timed(runs: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * runs)]
        for begin, end in zip(events[::2], events[1::2]):
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2])]

    timed(2)
    (once,) = timed(1)
    return statistics.median(timed(int(min(30, max(3, 250 / once)))))


def measure(what, who, length, heads, run, flop: float | None = None) -> Figure:
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        run()
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        ms = milliseconds(run)
    except torch.OutOfMemoryError:
        figure = Figure(what, who, length, heads, None, None, None)
    else:
        figure = Figure(what, who, length, heads, ms, flop and flop / ms / 1e9, gib)
    cells = ["out of memory"] if figure.ms is None else [f"{figure.ms:.2f} ms", f"{gib:.2f} GiB"]
    if figure.teraflops:
        cells.insert(1, f"{figure.teraflops:.0f} TF")
    print(f"{what:24} {who:22} {length:6} {heads:3} heads  " + "  ".join(cells), flush=True)
    return figure


def host(name: str):
    """A module of the installed megatron-core."""
    return importlib.import_module(f"{DSA}.{name}")


@contextlib.contextmanager
def computed_by(kernels: str):
    """With ``GLM5_PATCH_KERNELS`` set to it."""
    before = os.environ[env.KERNELS]
    os.environ[env.KERNELS] = kernels
    try:
        yield
    finally:
        os.environ[env.KERNELS] = before


def library(operation: str, name: str, call: Call) -> Backend | None:
    """A backend; None where it does not compute such a call."""
    found = (one for one in backends(operation) if one.name == name)
    with computed_by("auto"):
        return next((one for one in found if why_not(one, call) is None), None)


def libraries_of_attention(call: Call) -> list[str]:
    """Those that compute a part of it."""
    parts = {"cudnn": "backward", "flash_mla": "forward"}
    return [name for name in parts if library(f"sparse_attention.{parts[name]}", name, call)]


class Peers:
    """What this process can compare with."""

    def __init__(self) -> None:
        self.release = f"megatron-core {importlib.metadata.version('megatron-core')}"
        self.unfused = self.index_scores = self.indexer_loss = None
        self.sparse_mla = self.fused_scores = None
        if importlib.util.find_spec(f"{DSA}.dsa_kernels"):
            self.sparse_mla = getattr(host("ops.sparse_mla"), "SparseMLA", None)
            forward = host("ops.tilelang_indexer_fwd")
            self.fused_scores = getattr(forward, "indexer_fwd_interface", None)
        else:
            self.unfused = host("dsa").unfused_dsa_fn
            self.index_scores = host("dsa").DSAIndexer._compute_index_scores
            self.indexer_loss = host("dsa").compute_dsa_indexer_loss


def kernels_of(heads: int, length: int, peers: Peers):
    """The kernels alone, on absorbed queries: forward, and backward."""
    batch = random_batch(length, heads)
    absorbed = absorption.absorbed_inputs(batch.attention())
    query, call = absorbed.query, absorbed.call
    hopper = library("sparse_attention.forward", "gluon", call)
    ours, name = (gluon, "plugin (Gluon)") if hopper else (sparse_mla, "plugin (Triton)")
    backward_of = choose("sparse_attention.backward", call, own=True).compute.__module__
    gradients = importlib.import_module(backward_of).key_gradients
    forward, backward = FORWARD * batch.pairs, BACKWARD * batch.pairs

    def run():
        return ours.forward(absorbed)

    yield measure("kernel, forward", name, length, heads, run, forward)
    out, lse = run()
    d_out = torch.randn_like(out)
    yield measure(
        "row terms", "plugin (Triton)", length, heads, lambda: sparse_mla.row_terms(out, d_out)
    )
    terms = sparse_mla.row_terms(out, d_out)
    run = lambda: gradients(absorbed, lse, terms, d_out)
    who = name if gradients is ours.key_gradients else "plugin (unions)"
    yield measure("kernel, backward", who, length, heads, run, backward)
    for kept in KEPT:
        draw = torch.Generator("cuda").manual_seed(0)
        alike = absorbed._replace(topk_indices=random_topk(length, TOPK, draw, kept))
        _, of_alike = ours.forward(alike)
        run = lambda: gradients(alike, of_alike, terms, d_out)  # noqa: B023
        what = f"kernel, backward, {kept:.0%} kept"
        yield measure(what, who, length, heads, run, backward)
    if flash_mla := library("sparse_attention.forward", "flash_mla", call):
        theirs = lambda: flash_mla.compute(absorbed)
        yield measure("kernel, forward", "FlashMLA", length, heads, theirs, forward)
    if cudnn := library("sparse_attention.backward", "cudnn", call):
        theirs = lambda: cudnn.compute(absorbed, out, lse, d_out)
        yield measure("kernel, backward", "cuDNN", length, heads, theirs, backward)
    again = lambda: deterministic(gradients, absorbed, lse, terms, d_out)
    yield measure("kernel, backward", "plugin, deterministic", length, heads, again, backward)
    if peers.sparse_mla is not None:
        q = query.transpose(0, 1).contiguous().requires_grad_()
        kv = batch.latent.transpose(0, 1).contiguous().requires_grad_()
        if heads < 16:
            q = torch.nn.functional.pad(q.detach(), (0, 0, 0, 16 - heads)).requires_grad_()
        indices = batch.topk.unsqueeze(2)
        who = f"{peers.release} TileLang"

        def theirs():
            return peers.sparse_mla.apply(q, kv, indices, SCALE)[0]

        with torch.no_grad():
            yield measure("kernel, forward", who, length, heads, theirs, forward)
        result = theirs()
        grad = torch.randn_like(result)
        yield measure(
            "kernel, backward",
            who,
            length,
            heads,
            lambda: torch.autograd.grad(result, (q, kv), grad, retain_graph=True),
            backward,
        )


def deterministic(run: Callable, *args):
    torch.use_deterministic_algorithms(True)
    try:
        return run(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def core_of(heads: int, length: int, peers: Peers):
    """From queries, latent and up-projection to the output: what a layer's core does."""
    batch = random_batch(length, heads)
    inputs = [t.clone().requires_grad_() for t in (batch.query, batch.latent, batch.up)]

    def fused():
        return attend(batch.attention(*inputs))[0]

    def blocked():
        return sparse_attention(batch.attention(*inputs))[0]

    indices = batch.topk.long().clamp_min(0)

    def unfused():
        key, value = keys_and_values(batch.attention(*inputs))
        return peers.unfused(inputs[0], key, value, indices, SCALE)

    runs = {"plugin (Triton)": ("triton", fused)}
    for asked in libraries_of_attention(batch.attention().call)[:1]:
        runs["plugin (libraries)"] = (asked, fused)
    if length <= 8192:
        runs["plugin (torch)"] = ("torch", blocked)
    if peers.unfused is not None:
        runs[peers.release] = ("triton", unfused)
    for who, (kernels, run) in runs.items():
        with computed_by(kernels):
            with torch.no_grad():
                yield measure("core, forward", who, length, heads, run)
            yield measure(
                "core, forward + backward",
                who,
                length,
                heads,
                lambda run=run: torch.autograd.grad(run(), inputs, batch.upstream),
            )


def selection_of(length: int, peers: Peers):
    """Index scores, top-k, and both."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    query = draw(length, 1, INDEX_HEADS, INDEX_DIM).bfloat16()
    key, weights = draw(length, 1, INDEX_DIM).bfloat16(), draw(length, 1, INDEX_HEADS)
    queries = QueryPositions(torch.zeros(length, dtype=torch.int64, device="cuda"), longest=length)
    starts, positions = queries.spans()
    inputs = IndexerInputs(query, key, weights)
    hopper = library("index_topk", "gluon", inputs.call)
    own, name = (gluon_indexer, "plugin (Gluon)") if hopper else (indexer, "plugin (Triton)")
    flop = 2 * INDEX_HEADS * INDEX_DIM * pairs(length, length)
    scale = INDEX_DIM**-0.5
    height = min(length, (256 << 20) // (4 * length))
    scores = torch.zeros((height, length), device="cuda")
    found = torch.empty((height, TOPK), dtype=torch.int32, device="cuda")
    blocks = [slice(at, min(at + height, length)) for at in range(0, length, height)]

    def score(block: slice) -> None:
        scores[: block.stop - block.start] = own.index_scores(inputs, queries, block, scale)[0]

    def ours() -> None:
        for block in blocks:
            size = block.stop - block.start
            spans = starts[block], positions[block]
            indexer.select_into(found[:size], scores[:size], *spans, block.stop)

    def all_scores() -> None:
        for block in blocks:
            own.index_scores(inputs, queries, block, scale)

    yield measure("index scores", name, length, INDEX_HEADS, all_scores, flop)
    score(blocks[-1])
    yield measure("top-k", "plugin (Triton)", length, INDEX_HEADS, ours)
    yield measure(
        "top-k",
        "torch.topk, unsorted",
        length,
        INDEX_HEADS,
        lambda: [scores.topk(TOPK, sorted=False) for _ in blocks],
    )

    def select():
        return own.index_topk(IndexerInputs(query, key, weights), queries, TOPK, scale)

    yield measure("selection", name, length, INDEX_HEADS, select)
    if cudnn := library("index_topk.selection", "cudnn", inputs.call):
        theirs = lambda: [
            cudnn.compute(
                scores[: block.stop - block.start], starts[block], positions[block], length, TOPK
            )
            for block in blocks
        ]
        yield measure("top-k", "cuDNN", length, INDEX_HEADS, theirs)
        with computed_by("auto"):
            yield measure("selection", "plugin (libraries)", length, INDEX_HEADS, select)
    if peers.index_scores is not None:
        unfused = SimpleNamespace(index_n_heads=INDEX_HEADS, index_topk=TOPK)
        mask = torch.full((length, length), float("-inf"), device="cuda").triu_(1)
        run = lambda: (peers.index_scores(unfused, query, weights, key) + mask).topk(TOPK)[1]
        yield measure("selection", peers.release, length, INDEX_HEADS, run)
    if peers.fused_scores is not None:
        q, k, w = query.squeeze(1), key.squeeze(1), weights.squeeze(1)
        who = f"{peers.release} TileLang"
        run = lambda: [
            peers.fused_scores(
                q[block], k, w[block], starts[block], positions[block] + 1, clean_logits=True
            )
            for block in blocks
        ]
        yield measure("index scores", who, length, INDEX_HEADS, run, flop)


def with_lse(batch: Batch) -> AttentionInputs:
    attention = batch.attention()
    return attention._replace(lse=attend(attention)[1])


def loss_of(length: int, peers: Peers):
    """The indexer's loss over the selected keys, forward and backward, with 64 heads' target,
    behind an attention that has run."""
    batch = random_batch(length, heads=64)
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    inputs = [
        draw(length, 1, INDEX_HEADS, INDEX_DIM).bfloat16().requires_grad_(),
        draw(length, 1, INDEX_DIM).bfloat16().requires_grad_(),
        draw(length, 1, INDEX_HEADS).requires_grad_(),
    ]
    scale = INDEX_DIM**-0.5
    attended = with_lse(batch)

    def ours():
        settings = LossSettings(scale, 1 / length, sparse=True)
        loss = indexer_loss.index_loss(IndexerInputs(*inputs), attended, settings)
        return torch.autograd.grad(loss, inputs)

    yield measure("indexer loss", "plugin (Triton)", length, INDEX_HEADS, ours)
    if peers.indexer_loss is not None:
        key, _ = keys_and_values(batch.attention())
        unfused = SimpleNamespace(index_n_heads=INDEX_HEADS, index_topk=TOPK)
        mask = torch.full((length, length), float("-inf"), device="cuda").triu_(1)
        topk = batch.topk.long().clamp_min(0)
        group = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))

        def theirs():
            scores = peers.index_scores(unfused, inputs[0], inputs[2], inputs[1]) + mask
            loss = peers.indexer_loss(scores, topk, batch.query, key, SCALE, 1.0, True, group)
            return torch.autograd.grad(loss, inputs)

        yield measure("indexer loss", peers.release, length, INDEX_HEADS, theirs)


def dense_of(length: int):
    """Dense causal attention of the unabsorbed shape, for scale."""
    shape = (1, 64, length, DIMS.nope + DIMS.rope)
    q, k, v = (torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3))

    def run():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad():
        yield measure("core, forward", "torch SDPA, dense", length, 64, run)
    grad = torch.randn(shape, device="cuda").bfloat16()
    yield measure(
        "core, forward + backward",
        "torch SDPA, dense",
        length,
        64,
        lambda: torch.autograd.grad(run(), (q, k, v), grad),
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def check(heads: int, length: int = 3072) -> list[str]:
    """What is wrong with the kernels at this number of heads; nothing if all is right."""
    problems: list[str] = []

    def bound(what: str, error: float, most: float) -> None:
        print(f"check {heads:3} heads: {what:28} {error:.1e} (at most {most:.0e})", flush=True)
        if not error <= most:
            problems.append(f"{heads} heads: {what} is off by {error:.1e}")

    batch = random_batch(length, heads, seed=heads)
    absorbed = absorption.absorbed_inputs(batch.attention())
    query, latent = absorbed.query, absorbed.latent
    some = torch.arange(0, length, 97, device="cuda")
    expected = []
    for row in some.tolist():
        keys = batch.topk[0, row][batch.topk[0, row] >= 0].long()
        kv = latent[keys, 0].double()
        probs = (query[row, 0].double() @ kv.T * SCALE).softmax(-1)
        expected.append(probs @ kv[:, : DIMS.latent])
    for name in ("triton", "gluon", "flash_mla"):
        if one := library("sparse_attention.forward", name, absorbed.call):
            _fill_with_nan(2 * query.numel())
            out, _ = one.compute(absorbed)
            bound(f"{name} forward", relative(out[some, 0], torch.stack(expected)), 2e-3)
    inputs = [t.clone().requires_grad_() for t in (batch.query, batch.latent, batch.up)]
    reference = [t.float().detach().requires_grad_() for t in inputs]
    truth, _ = sparse_attention(batch.attention(*reference))
    expected = torch.autograd.grad(truth, reference, batch.upstream.float())
    kinds = {
        "as they come": ("triton", absorption.absorbed_attention),
        "deterministic": ("triton", absorption.absorbed_attention),
        "core": ("triton", attend),
    }
    for asked in libraries_of_attention(batch.attention().call):
        kinds[f"core by {asked}"] = (asked, attend)
    for kind, (kernels, attention) in kinds.items():
        os.environ[env.KERNELS] = kernels
        torch.use_deterministic_algorithms(kind == "deterministic")
        _fill_with_nan(2 * query.numel())
        output, _ = attention(batch.attention(*inputs))
        found = torch.autograd.grad(output, inputs, batch.upstream, retain_graph=True)
        for name, ours, theirs in zip(("query", "latent", "up"), found, expected):
            bound(f"gradient of {name}, {kind}", relative(ours, theirs), 5e-3)
        if kind == "deterministic":
            again = torch.autograd.grad(output, inputs, batch.upstream)
            if not all(torch.equal(a, b) for a, b in zip(found, again)):
                problems.append(f"{heads} heads: the deterministic gradients are not repeatable")
    torch.use_deterministic_algorithms(False)
    os.environ[env.KERNELS] = "triton"
    return problems


def check_selection(length: int) -> list[str]:
    """Compare the scores of the chosen keys, sorted, with those of torch's choice."""
    generator = torch.Generator("cuda").manual_seed(length)
    query = torch.randn(length, 1, INDEX_HEADS, INDEX_DIM, generator=generator, device="cuda")
    key = torch.randn(length, 1, INDEX_DIM, generator=generator, device="cuda")
    weights = torch.randn(length, 1, INDEX_HEADS, generator=generator, device="cuda")
    query, key = query.bfloat16(), key.bfloat16()
    queries = QueryPositions(torch.zeros(length, dtype=torch.int64, device="cuda"), longest=length)
    scale = INDEX_DIM**-0.5
    ours = index_topk(IndexerInputs(query, key, weights), queries, TOPK, scale)[0]
    with computed_by("auto"):
        if not torch.equal(
            indexer.index_topk(IndexerInputs(query, key, weights), queries, TOPK, scale)[0], ours
        ):
            return [f"the top-k at {length} by a library is another"]
    worst = 0.0
    for row in range(0, length, max(1, length // 40)):
        products = (query[row, 0].double() @ key[: row + 1, 0].double().T * scale).relu()
        scores = weights[row, 0].double() @ products
        chosen = ours[row][ours[row] >= 0].long()
        best = scores.topk(min(TOPK, row + 1))[0]
        if len(chosen.unique()) != len(best):
            return [f"row {row} of {length} has {len(chosen.unique())} keys, not {len(best)}"]
        worst = max(worst, relative(scores[chosen].sort(descending=True)[0], best))
    print(f"check top-k at {length}: scores of the chosen keys off by {worst:.1e}", flush=True)
    return [] if worst <= 1e-5 else [f"the top-k at {length} is off by {worst:.1e}"]


def check_loss(length: int = 3072) -> list[str]:
    """The loss and its gradients against their definition in fp32."""
    heads = 64
    batch = random_batch(length, heads, seed=5)
    generator = torch.Generator("cuda").manual_seed(2)
    shapes = (length, 1, INDEX_HEADS, INDEX_DIM), (length, 1, INDEX_DIM), (length, 1, INDEX_HEADS)
    drawn = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    inputs = [drawn[0].bfloat16(), drawn[1].bfloat16(), drawn[2]]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    scale = INDEX_DIM**-0.5
    settings = LossSettings(scale, 1.0, sparse=True)
    loss = indexer_loss.index_loss(IndexerInputs(*inputs), with_lse(batch), settings)
    found = (loss, *torch.autograd.grad(loss, inputs))

    reference = [tensor.float().detach().requires_grad_() for tensor in inputs]
    mask = selected_keys(slice(0, length), batch.queries, batch.topk)[0]
    floats = (t.float() for t in (batch.query, batch.latent, batch.up))
    key, _ = keys_and_values(batch.attention(*floats))
    truth = torch.zeros((length, length), device="cuda")
    for head in range(heads):
        logits = batch.query[:, 0, head].float() @ key[:, 0, head].T * SCALE
        truth += logits.masked_fill(~mask, float("-inf")).softmax(-1) / heads
    scores = torch.zeros((length, length), device="cuda")
    for head in range(INDEX_HEADS):
        products = (reference[0][:, 0, head] @ reference[1][:, 0].T * scale).relu()
        scores = scores + reference[2][:, 0, head, None] * products
    log_predicted = scores.masked_fill(~mask, float("-inf")).log_softmax(-1)
    terms = truth * (truth.clamp_min(1e-10).log() - log_predicted.masked_fill(~mask, 0.0))
    expected = (terms.sum(), *torch.autograd.grad(terms.sum(), reference))
    problems = []
    for name, ours, theirs in zip(("loss", "query", "key", "weights"), found, expected):
        error = relative(ours, theirs)
        print(f"check indexer loss: {name:8} {error:.1e} (at most 5e-03)", flush=True)
        if not error <= 5e-3:
            problems.append(f"indexer loss: {name} is off by {error:.1e}")
    return problems


def _fill_with_nan(numel: int) -> None:
    """So that memory which a kernel forgets to write shows."""
    torch.full((numel,), float("nan"), device="cuda")


def plot(figures: list[Figure], path: Path) -> None:
    """Time and memory against length: one colour and one marker for a series in all panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shown = ("core, forward + backward", "selection", "indexer loss")
    drawn = [f for f in figures if f.what in shown and f.heads in (64, INDEX_HEADS) and f.ms]
    peers = sorted({f.who for f in drawn})
    styles = {who: dict(color=f"C{n}", marker="osD^vX"[n % 6]) for n, who in enumerate(peers)}
    lengths = sorted({f.length for f in drawn})
    fig, axes = pyplot.subplots(2, len(shown), figsize=(13, 7.5), sharex=True, squeeze=False)
    for column, what in enumerate(shown):
        axes[0][column].set_title(what)
        axes[1][column].set_xlabel("tokens")
        for who in peers:
            line = sorted(
                (f for f in drawn if (f.what, f.who) == (what, who)), key=lambda f: f.length
            )
            for axis, values in zip(axes[:, column], ([f.ms for f in line], [f.gib for f in line])):
                axis.plot([f.length for f in line], values, **styles[who])
        for axis, unit in zip(axes[:, column], ("ms", "GiB")):
            axis.set(ylabel=unit, xscale="log", yscale="log")
            axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.grid(alpha=0.3)
    lines = [pyplot.Line2D([], [], **styles[who]) for who in peers]
    fig.legend(lines, peers, loc="lower center", ncols=len(peers), frameon=False)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    temporary = path.with_name("." + path.name)
    fig.savefig(temporary, dpi=110)
    pyplot.close(fig)
    temporary.replace(path)


def table(runs: list[dict]) -> str:
    """The figures as Markdown, a column for each length; of further runs, the rows that are new."""
    figures = [Figure(**figure) for figure in runs[0]["figures"]]
    for run in runs[1:]:
        known = {(figure.what, figure.who, figure.heads) for figure in figures}
        more = [Figure(**figure) for figure in run["figures"]]
        figures += [one for one in more if (one.what, one.who, one.heads) not in known]
    lengths = sorted({figure.length for figure in figures})
    lines = [
        "| | who | heads | " + " | ".join(f"{length // 1024}k" for length in lengths) + " |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    cells: dict[tuple, dict[int, str]] = {}
    for figure in figures:
        row = cells.setdefault((figure.what, figure.who, figure.heads), {})
        row[figure.length] = _cell(figure)
    by_name_and_heads = lambda item: (item[0][0], -item[0][2])
    for (what, who, heads), row in sorted(cells.items(), key=by_name_and_heads):
        shown = " | ".join(row.get(length, "") for length in lengths)
        lines.append(f"| {what} | {who} | {heads} | {shown} |")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    if figure.ms is None:
        return "out of memory"
    teraflops = f" ({figure.teraflops:.0f} TF)" if figure.teraflops else ""
    return f"{figure.ms:.2f} ms{teraflops}, {figure.gib:.2f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 32, 16, 8])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR")
    parser.add_argument("--check", action="store_true", help="check, and time nothing")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="print an earlier run's table, and beside it the new rows of further runs",
    )
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw an earlier run again")
    options = parser.parse_args()
    if options.plot:
        earlier = json.loads(options.plot.read_text())["figures"]
        plot([Figure(**figure) for figure in earlier], options.plot.with_suffix(".png"))
        return 0
    if options.table:
        print(table([json.loads(path.read_text()) for path in options.table]))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device", file=sys.stderr)
        return 2
    os.environ[env.KERNELS] = "triton"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the deterministic mode
    torch.backends.cuda.matmul.allow_tf32 = False
    problems = [p for heads in options.heads for p in check(heads)]
    if "loss" in options.parts:
        problems += check_loss()
    if "selection" in options.parts:
        problems += [p for length in options.lengths for p in check_selection(length)]
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if problems or options.check:
        return int(bool(problems))
    peers, figures = Peers(), []
    for length in options.lengths:
        if "selection" in options.parts:
            figures += selection_of(length, peers)
        if "loss" in options.parts:
            figures += loss_of(length, peers)
        if "dense" in options.parts and length <= 16384:
            figures += dense_of(length)
        for heads in options.heads:
            if "kernels" in options.parts:
                figures += kernels_of(heads, length, peers)
            if "core" in options.parts and heads == 64:
                figures += core_of(heads, length, peers)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "kernels.json"
    record.write(path, figures=[figure._asdict() for figure in figures])
    plot(figures, options.output / "kernels.png")
    print(f"wrote {path} and {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
