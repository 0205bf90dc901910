"""Ways of splitting a GLM-5.2-shaped model over the GPUs of one host, beside one GPU, in one run.

    torchrun --nproc-per-node 4 benchmarks/multi_gpu.py [--tokens 8192 32768] [--output DIR]
    torchrun --nproc-per-node 4 benchmarks/multi_gpu.py --only "CP 4" --dense --microbatches 1 \\
        --tokens 32768 1048576 --compare-at 8192
    torchrun --nproc-per-node 4 benchmarks/multi_gpu.py --layouts four
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --fp32
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --device cpu

Seven layers of GLM-5.2's width, of which 1, 2, 3 and 7 compute their top-k, few experts, random
weights, bf16, full recompute, two microbatches a step, the indexer's loss, megatron-core's
schedule, modules of the local backend, gradients reduced beside the backward. "1 GPU" runs on every
rank by itself. "tokens" and "heads" are what tensor parallelism shares out (GLM5_PATCH_TP). Stages
of "PP" may start on any layer. Experts are split between all ranks of a stage.

A rate is of the median of the timed steps, per GPU and as a share of one GPU's, and in TFLOP/s as
``flops`` counts them; memory is the peak of the worst rank. On GPUs one more step says where the
ranks' time goes, on average, see ``splits.phases``. The last lines are a table.

At one length the gradients of a step are compared with one GPU's twice: with the same keys and
experts, recorded there and replayed here, which must agree; and with the split's own, where the
selected keys that differ are counted: bf16 rounds near ties differently in every split, so that
distance says nothing about an implementation. The length is the first one. With --compare-at it is
another, and "1 GPU" is timed at no longer one.

How far they may be apart on GPUs is measured in the same run: 1.25 times as far as one GPU's are
from its own with every matrix product summed in two halves, each rounded, as a split of two does
it. With --fp32 the same runs in fp32, at a length of 3072, without the kernels for bf16: rounding
shrinks, a mistake does not. Where a split fails, its row has the error, and the next one runs.
Exits 1 if a split or a check fails. On the CPU (gloo, fp32, tiny widths) it checks, to 5e-6, and
times nothing worth reading.

--impl transformer_engine trains with Transformer Engine's modules and the fusions that
Megatron-LM's scripts turn on. Their products can't be halved from outside, so rates are measured
and no gradients compared. --dispatcher says how tokens reach their experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

# The allocator reads it once: blocks of many sizes leave no holes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import flops
import record
import torch
from splits import phases
from splits.model import MICROBATCHES, Model, Shape, Split, dtype_on, initialised, splits
from splits.ranks import Ranks
from splits.reference import Reference

import glm5_patch
from glm5_patch.testing import cpu_host
from glm5_patch.testing.halved_products import HalvedProducts
from glm5_patch.testing.models import let_go

ON_CPU = 5e-6
"""Bound of the gradients' relative distance with the same keys and experts."""
SPREAD = 1.25
"""On GPUs: the bound, as a multiple of one GPU's distance from itself with halved products."""
LAYOUTS = {
    "four": (
        "--only 'EP 4' --experts 64 --tokens 8192 --compare-at 4096",
        "--only 'TP 4, tokens' 'CP 4' --tokens 8192 32768",
        "--only 'TP 4, tokens' 'CP 4' --dense --tokens 8192 32768",
        "--only 'PP 4' --microbatches 8 --tokens 8192 --compare-at 4096 --steps 1",
        "--only 'CP 4' --dense --microbatches 1 --vocabulary 2048 --steps 1 --compare-at 0 "
        "--no-phases --offload --tokens 262144 524288",
        "--only 'CP 4' --dense --layers 4 --microbatches 1 --vocabulary 2048 --steps 1 "
        "--compare-at 0 --no-phases --offload --tokens 1048576",
    ),
}
"""Options of the runs that --layouts makes."""


def say(line: str) -> None:
    if os.environ["RANK"] == "0":
        print(line, flush=True)


class Comparison:
    """All splits of one model, one after another."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks):
        self.options, self.ranks = options, ranks
        self.device, self.on_gpu = torch.device(options.device), options.device == "cuda"
        self.dtype = torch.float32 if options.fp32 else dtype_on(options.device)
        experts = 0 if options.dense else options.experts
        self.shape = Shape(
            layers=options.layers,
            experts=experts,
            microbatches=options.microbatches,
            vocabulary=options.vocabulary,
            offload=options.offload,
            dispatcher=options.dispatcher,
            shared_experts_beside=options.shared_experts_beside,
            impl=options.impl,
        )
        self.compared_at = options.tokens[0] if options.compare_at is None else options.compare_at
        self.reference: Reference | None = None
        self.bound = ON_CPU
        self.rates: dict[int, float] = {}
        """Tokens a second of one GPU, by length."""
        self.rows: list[dict] = []
        self.failed: list[str] = []
        self._length = self.compared_at

    def run(self) -> None:
        only, index_topk = self.options.only, self.shape.config(not self.on_gpu).index_topk
        if 0 < self.compared_at <= index_topk:
            raise SystemExit(
                f"gradients would be compared at {self.compared_at} tokens, where every key is "
                f"selected; --compare-at must be 0, or above index_topk={index_topk}"
            )
        known = splits(self.ranks.size, self.shape)
        unknown = set(only or ()) - {split.name for split in known}
        if unknown:
            names = ", ".join(repr(split.name) for split in known)
            raise SystemExit(f"--only {unknown.pop()!r}: must be of {names}")
        for split in known:
            if self.compared_at if split.alone else not only or split.name in only:
                error = self.ranks.attempt(lambda split=split: self._split(split))
                if error is not None:
                    self.failed.append(f"{split.name}: {error}")
                    self._add({**self._named(split, self._length), "error": error})

    def _split(self, split: Split) -> None:
        model = None
        try:
            with initialised(split, self.shape):
                model = Model(split, self.options.device, self.shape, self.dtype)
                self._measure(model)
        finally:
            if model is not None:
                let_go([model.ddp])

    def _measure(self, model: Model) -> None:
        self._length = self.compared_at
        lengths, gradients = self.options.tokens, {}
        if model.split.alone:
            if self.options.impl == "local":
                self.reference = Reference(model, self.compared_at)
                gradients = self._noise(model, self.compared_at)
            if self.options.compare_at is not None:
                lengths = [length for length in lengths if length <= self.compared_at]
        elif self.reference is not None:
            gradients = self._gradients(model, self.compared_at)
        if not lengths:
            self._add({**self._named(model.split, self.compared_at), **gradients})
        for self._length in lengths:
            named = self._named(model.split, self._length)
            self._add({**named, **self._measured(model, self._length), **gradients})
            gradients = {}

    def _named(self, split: Split, length: int) -> dict:
        shape = self.shape
        kind = f"{shape.experts} experts" if shape.experts else "dense"
        asked = [shape.impl.replace("_", " ")] if shape.impl != "local" else []
        asked += [shape.dispatcher] if shape.dispatcher else []
        asked += ["shared experts beside"] if shape.shared_experts_beside else []
        microbatches = f"{shape.microbatches} microbatches"
        model = ", ".join([f"{shape.layers} layers", kind, microbatches, *asked])
        return {"model": model, "split": split.name, "tokens": length}

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        say(json.dumps(row))

    def _noise(self, model: Model, length: int) -> dict:
        """How far one GPU is from itself, with the same keys and experts."""
        found = {"compared at": length}
        halved = HalvedProducts(torch.ops.aten.mm.default)
        for name, way in (("again", nullcontext()), ("halved products", halved)):
            model.fill()
            with self.reference.replayed(model, []), way:
                model.step(length)
            found[f"gradients, {name}"] = float(f"{self.reference.distance(model):.2g}")
        if self.on_gpu:
            self.bound = SPREAD * found["gradients, halved products"]
        return found

    def _gradients(self, model: Model, length: int) -> dict:
        differing: list[float] = []
        with self.reference.replayed(model, differing):
            model.step(length)
        replayed = self.reference.distance(model)
        model.fill()
        model.step(length)
        own = self.reference.distance(model)
        shares = torch.tensor(
            [sum(differing), len(differing)], device=self.device, dtype=torch.float64
        )
        torch.distributed.all_reduce(shares)
        if not replayed <= self.bound:
            by = f"{replayed:.1e}, of {self.bound:.1e}"
            self.failed.append(f"{model.split.name}: gradients off by {by}")
        return {
            "compared at": length,
            "gradients, same keys and experts": float(f"{replayed:.2g}"),
            "gradients, own": float(f"{own:.2g}"),
            "selected keys that differ": float(f"{(shares[0] / shares[1]).item():.2g}"),
        }

    def _measured(self, model: Model, length: int) -> dict:
        for _ in range(self.options.warmup):  # kernels compile, communicators connect
            model.step(length)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = [self._timed(model, length) for _ in range(self.options.steps)]
        seconds = statistics.median(taken for taken, _ in times)
        loss = model.loss(times[-1][1])
        if not math.isfinite(loss):
            self.failed.append(f"{model.split.name}: the loss at {length} tokens is {loss}")
        ranks = 1 if model.split.alone else self.ranks.size
        copies = 1 if model.split.alone else model.split.dp
        rate = length * self.shape.microbatches * copies / seconds / ranks
        if model.split.alone:
            self.rates[length] = rate
        peak = torch.tensor(
            torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0, device=self.device
        )
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        one_gpu = self.rates.get(length)
        return {
            "tokens/s a GPU": round(rate),
            **({"of one GPU": round(rate / one_gpu, 3)} if one_gpu else {}),
            **flops.rates(model.hf, length, rate),
            "peak GiB": round(peak.item(), 1),
            "loss": round(loss, 4),
            "step ms": round(seconds * 1e3, 1),
            **(self._phases(model, length, seconds) if self.options.phases else {}),
        }

    def _timed(self, model: Model, length: int) -> tuple[float, torch.Tensor]:
        self._wait()
        start = time.perf_counter()
        loss = model.step(length)
        self._wait()
        return time.perf_counter() - start, loss

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def _phases(self, model: Model, length: int, seconds: float) -> dict:
        if not self.on_gpu:
            return {}
        self._wait()
        events = phases.profiled(lambda: model.step(length), model.experts())
        ranks = [None] * self.ranks.size
        torch.distributed.all_gather_object(ranks, phases.breakdown(events, seconds * 1e3))
        return phases.of_ranks(ranks)


def table(rows: list[dict]) -> str:
    """Of all splits and lengths, in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    tokens = "of a sequence: 8192 32768; 3072 with --fp32, 64 on the CPU"
    found.add_argument("--tokens", type=int, nargs="+", help=tokens)
    found.add_argument(
        "--compare-at",
        type=int,
        metavar="TOKENS",
        help="length at which gradients are compared, and the longest that '1 GPU' is timed at; "
        "0: '1 GPU' does not run, and nothing is compared",
    )
    found.add_argument("--only", nargs="+", help="these splits, such as 'TP 4, tokens'; and 1 GPU")
    found.add_argument("--layers", type=int, default=7, help="of the model (7)")
    found.add_argument("--experts", type=int, default=8, help="routed experts (8)")
    found.add_argument("--dense", action="store_true", help="no layer has experts")
    found.add_argument(
        "--microbatches", type=int, default=MICROBATCHES, help="of a step and rank (2)"
    )
    vocabulary = "tokens of it (32768): logits of a million tokens take more than the layers"
    found.add_argument("--vocabulary", type=int, help=vocabulary)
    offload = "top-k, and inputs of recomputed layers, wait in host memory"
    found.add_argument("--offload", action="store_true", help=offload)
    dispatcher = "how tokens reach their experts (alltoall; allgather on the CPU)"
    found.add_argument("--dispatcher", choices=("alltoall", "allgather"), help=dispatcher)
    beside = "shared experts run beside the exchange of the others (with alltoall)"
    found.add_argument("--shared-experts-beside", action="store_true", help=beside)
    impl = "modules of the model; with Transformer Engine's nothing is compared (local)"
    found.add_argument(
        "--impl", choices=("local", "transformer_engine"), default="local", help=impl
    )
    found.add_argument("--steps", type=int, default=3, help="timed, of each split and length (3)")
    found.add_argument("--warmup", type=int, default=1, help="steps before those timed (1)")
    phases = "one more step of each split and length, for where its time goes"
    found.add_argument("--phases", action=argparse.BooleanOptionalAction, default=True, help=phases)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--fp32", action="store_true", help="for the gradients, not for the rates")
    found.add_argument("--output", type=Path, help="write multi_gpu.json there")
    found.add_argument(
        "--layouts",
        metavar="NAME|FILE",
        help=f"several runs: {', '.join(LAYOUTS)}, or a file with the options of one on each line, "
        "which go before those given here",
    )
    return found


def runs(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run."""
    if options.layouts is None:
        found = [options]
    else:
        lines = LAYOUTS.get(options.layouts) or Path(options.layouts).read_text().splitlines()
        lines = filter(None, (shlex.split(line, comments=True) for line in lines))
        found = [parser().parse_args(line, copy.copy(options)) for line in lines]
    for one in found:
        one.tokens = one.tokens or (
            [64] if one.device == "cpu" else [3072] if one.fp32 else [8192, 32768]
        )
    return found


def main() -> int:
    options = parser().parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("benchmarks/multi_gpu.py needs a CUDA device, or --device cpu", file=sys.stderr)
        return 2
    if on_cpu:
        torch.set_num_threads(1)
        cpu_host.enable()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks = Ranks(on_gpu=not on_cpu)
    glm5_patch.require()
    rows, failed = [], []
    for run in runs(options):
        comparison = Comparison(run, ranks)
        with cpu_host.CudaLiterals() if on_cpu else nullcontext():
            comparison.run()
        rows += comparison.rows
        failed += comparison.failed
        if options.output and ranks.rank == 0:
            record.write(options.output / "multi_gpu.json", rows=rows)
    say("\n".join(f"- {name}: {value}" for name, value in record.machine().items()) + "\n")
    say(table(rows))
    compared = any("gradients, own" in row for row in rows)
    agrees = "all compared gradients agree" if compared else "no gradients were compared"
    say("FAILED: " + "; ".join(failed) if failed else agrees)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
