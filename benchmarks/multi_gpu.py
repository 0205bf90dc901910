"""Ways of splitting a GLM-5.2-shaped model over the GPUs of one host, beside one GPU, in one run.

    torchrun --nproc-per-node 4 benchmarks/multi_gpu.py [--lengths 8192 32768] [--output DIR]
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --fp32
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --device cpu

Seven layers of GLM-5.2's width, of which 1, 2, 3 and 7 compute their top-k, few experts, random
weights, bf16, full recompute, two microbatches a step, the indexer's loss, megatron-core's
schedule, modules of the local backend, gradients reduced beside the backward. "1 GPU" runs on every
rank by itself. "tokens" and "heads" are what tensor parallelism shares out (GLM5_PATCH_TP). Experts
are split between all ranks wherever there are several.

A rate is of the median of the timed steps, per GPU and as a share of one GPU's, and in TFLOP/s as
``flops`` counts them; memory is the peak of the worst rank. The last lines are a table. At the
first length the gradients of a step are compared with one GPU's twice: with the same keys and
experts, recorded there and replayed here, which must agree; and with the split's own, where the
selected keys that differ are counted: bf16 rounds near ties differently in every split, so that
distance says nothing about an implementation.

How far they may be apart on GPUs is measured in the same run: 1.25 times as far as one GPU's are
from its own with every matrix product summed in two halves, each rounded, as a split of two does
it. With --fp32 the same runs in fp32, at a length of 3072, without the kernels for bf16: rounding
shrinks, a mistake does not. --profile shows where a step's time goes on rank 0. Exits 1 if a check
fails. On the CPU (gloo, fp32, tiny widths) it checks, to 5e-6, and times nothing worth reading.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import flops
import torch
from split_model import MICROBATCHES, Model, Split, dtype_on, initialised, splits
from torch.utils._python_dispatch import TorchDispatchMode

import glm5_patch
from glm5_patch.checkpoint.names import own_part
from glm5_patch.testing import cpu_host
from glm5_patch.testing.models import let_go
from glm5_patch.testing.parity import kept_share
from glm5_patch.topk.source import Selection

ON_CPU = 5e-6
"""Bound of the gradients' relative distance with the same keys and experts."""
SPREAD = 1.25
"""On GPUs: the bound, as a multiple of one GPU's distance from itself with halved products."""
KINDS = {
    "communication": "nccl",
    "attention": "^(forward|backward|row_terms|project|rotate)$|flash|fmha|sdpa",
    "selection and indexer loss": "^(scores|candidates|topk|head_sums|loss)$|sort",
    "matrix products": "gemm|nvjet|cutlass|xmma",
}
"""Patterns of the names of kernels, the first that fits; the rest is elementwise work."""


def say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(line, flush=True)


class Reference:
    """One GPU's step: its gradients by the tensors that make them, and its top-k."""

    def __init__(self, model: Model, length: int):
        self.length = length
        self.topk_indices: dict[tuple[int, int], torch.Tensor] = {}
        self.experts: dict[tuple[int, int], torch.Tensor] = {}
        """[tokens, experts of a token] by microbatch and layer."""
        with self._observed(model), routed_by(model, self._record):
            model.step(length)
        self.gradients = {
            sources: parameter.main_grad.to(model.dtype).cpu()
            for _, parameter, sources in model.gradients()
        }

    @contextmanager
    def _observed(self, model: Model):
        def keep(layer_number, topk_indices):
            key = model.microbatch, layer_number
            if key not in self.topk_indices:  # else a recompute
                self.topk_indices[key] = topk_indices.cpu()

        computing = [core for core in model.cores() if core.topk_source.computes]
        for core in computing:
            core.observer = keep
        yield
        for core in computing:
            del core.observer

    @contextmanager
    def replayed(self, model: Model, differing: list[float]):
        """Layers attend to the recorded keys; the share that they would not have selected is
        appended."""
        rows = model.routed_positions(self.length)

        def experts(key, scores, topk, choose):
            chosen = self.experts[key][rows].to(scores.device)
            return scores.gather(1, chosen), chosen

        with ExitStack() as undo:
            undo.enter_context(routed_by(model, experts))
            for core in model.cores():
                self._replay(core, model, differing)
                undo.callback(delattr, core.topk_source, "selection")
            yield

    def _record(self, key, scores, topk, choose):
        probs, chosen = choose(scores, topk)
        self.experts[key] = chosen.cpu()
        return probs, chosen

    def _replay(self, core, model: Model, differing: list[float]) -> None:
        source = core.topk_source
        select = source.selection  # of the class

        def selection(indexer, hidden_states, q_latent, layout, wants_inputs=False):
            found, inputs = select(indexer, hidden_states, q_latent, layout, wants_inputs)
            recorded = self.topk_indices[model.microbatch, source.source]
            recorded = recorded[:, layout.queries.places.cpu()].to(found.device)
            if source.computes and not torch.is_grad_enabled():
                differing.append(1 - kept_share(found, recorded))
            return Selection(recorded, inputs)

        source.selection = selection

    def distance(self, model: Model) -> float:
        """Relative L2, over the parameters of all ranks."""
        squares = torch.zeros(2, dtype=torch.float64, device=model.device)
        for name, parameter, sources in model.gradients():
            whole = self.gradients[sources].chunk(len(sources))
            expected = own_part(name, whole, parameter).to(model.device).float()
            squares[0] += (parameter.main_grad.float() - expected).square().sum()
            squares[1] += expected.square().sum()
        torch.distributed.all_reduce(squares)
        return (squares[0] / squares[1]).sqrt().item()


class HalvedProducts(TorchDispatchMode):
    """Every matrix product is the sum of two, over half of the summed dimension each."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.mm.default:
            return function(*args, **(kwargs or {}))
        left, right = args
        half = left.shape[1] // 2
        first = function(left[:, :half], right[:half])
        return first + function(left[:, half:], right[half:])


class Routing:
    """What a router of megatron-core asks for its experts."""

    def __init__(self, model: Model, layer_number: int, answer):
        self.model, self.layer_number, self.answer = model, layer_number, answer

    def get_replay_topk(self, scores, topk, num_groups, group_topk, default_compute_topk):
        def choose(scores, topk):
            return default_compute_topk(scores, topk, num_groups, group_topk)

        return self.answer((self.model.microbatch, self.layer_number), scores, topk, choose)


@contextmanager
def routed_by(model: Model, answer):
    """Every router gets its experts from ``answer(key, scores, topk, choose)``."""
    routers = list(model.routers())
    for layer_number, router in routers:
        router.router_replay = Routing(model, layer_number, answer)
    yield
    for _, router in routers:
        router.router_replay = None


class Comparison:
    """All splits, one after another."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.on_gpu = options.device == "cuda"
        self.dtype = torch.float32 if options.fp32 else dtype_on(options.device)
        self.reference: Reference | None = None
        self.bound = ON_CPU
        self.rates: dict[int, float] = {}
        """Tokens a second of one GPU, by length."""
        self.rows: list[dict] = []
        self.failed: list[str] = []

    def run(self) -> None:
        for split in splits(torch.distributed.get_world_size()):
            if self.options.only and not split.alone and split.name not in self.options.only:
                continue
            with initialised(split):
                self._split(split)
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def _split(self, split: Split) -> None:
        model = Model(split, self.options.device, self.options.experts, self.dtype)
        first = self.options.lengths[0]
        gradients = {}
        if split.alone:
            self.reference = Reference(model, first)
            gradients = self._noise(model, first)
        else:
            gradients = self._gradients(model, first)
        for length in self.options.lengths:
            row = {"split": split.name, "tokens": length, **self._measured(model, length)}
            if length == first:
                row |= gradients
            self.rows.append(row)
            say(json.dumps(row))
        if self.options.profile and self.on_gpu:
            self._profile(model, first)
        let_go([model.ddp])

    def _noise(self, model: Model, length: int) -> dict:
        """How far one GPU is from itself, with the same keys and experts."""
        found = {}
        for name, way in (("again", nullcontext()), ("halved products", HalvedProducts())):
            model.fill()
            with self.reference.replayed(model, []), way:
                model.step(length)
            found[f"gradients, {name}"] = self.reference.distance(model)
        if self.on_gpu:
            self.bound = SPREAD * found["gradients, halved products"]
        return {name: float(f"{distance:.2g}") for name, distance in found.items()}

    def _gradients(self, model: Model, length: int) -> dict:
        differing: list[float] = []
        with self.reference.replayed(model, differing):
            model.step(length)
        replayed = self.reference.distance(model)
        model.fill()
        model.step(length)
        own = self.reference.distance(model)
        shares = torch.tensor([sum(differing), len(differing)], device=self.device)
        torch.distributed.all_reduce(shares)
        if not replayed <= self.bound:
            by = f"{replayed:.1e}, of {self.bound:.1e}"
            self.failed.append(f"{model.split.name}: gradients off by {by}")
        return {
            "gradients, same keys and experts": float(f"{replayed:.2g}"),
            "gradients, own": float(f"{own:.2g}"),
            "selected keys that differ": float(f"{(shares[0] / shares[1]).item():.2g}"),
        }

    def _measured(self, model: Model, length: int) -> dict:
        for _ in range(self.options.warmup):  # kernels compile, communicators connect
            model.step(length)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(self._timed(model, length) for _ in range(self.options.steps))
        ranks = 1 if model.split.alone else torch.distributed.get_world_size()
        copies = 1 if model.split.alone else model.split.dp
        rate = length * MICROBATCHES * copies / seconds / ranks
        if model.split.alone:
            self.rates[length] = rate
        peak = torch.tensor(
            torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0, device=self.device
        )
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        return {
            "tokens/s a GPU": round(rate),
            "of one GPU": round(rate / self.rates[length], 3),
            **flops.rates(model.hf, length, rate),
            "peak GiB": round(peak.item(), 1),
        }

    def _timed(self, model: Model, length: int) -> float:
        self._wait()
        start = time.perf_counter()
        model.step(length)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def _profile(self, model: Model, length: int) -> None:
        """Milliseconds of one step by kind of kernel; communication may overlap the rest."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            model.step(length)
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for event in found.key_averages():
            name = event.key.lower()
            kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "other")
            spent[kind] += event.self_device_time_total / 1e3
        say(json.dumps({"split": model.split.name, "ms": {k: round(v) for k, v in spent.items()}}))


def table(rows: list[dict]) -> str:
    """Of all splits and lengths, in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    lengths = "8192 32768; 3072 with --fp32, 64 on the CPU"
    parser.add_argument("--lengths", type=int, nargs="+", help=lengths)
    parser.add_argument("--steps", type=int, default=3, help="timed, of each split and length (3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those timed (1)")
    parser.add_argument("--experts", type=int, default=8, help="routed experts (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--fp32", action="store_true", help="for the gradients, not for the rates")
    parser.add_argument("--only", nargs="+", help="these splits, such as 'TP 4, tokens'; and 1 GPU")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--output", type=Path, help="write multi_gpu.json there")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("benchmarks/multi_gpu.py needs a CUDA device, or --device cpu", file=sys.stderr)
        return 2
    usual = [64] if on_cpu else [3072] if options.fp32 else [8192, 32768]
    options.lengths = options.lengths or usual
    if on_cpu:
        torch.set_num_threads(1)
        cpu_host.enable()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl")
    glm5_patch.require()
    comparison = Comparison(options)
    with cpu_host.CudaLiterals() if on_cpu else nullcontext():
        comparison.run()
    if options.output and not on_cpu and torch.distributed.get_rank() == 0:
        import record

        record.write(options.output / "multi_gpu.json", rows=comparison.rows)
    say(table(comparison.rows))
    say("FAILED: " + "; ".join(comparison.failed) if comparison.failed else "all gradients agree")
    torch.distributed.destroy_process_group()
    return int(bool(comparison.failed))


if __name__ == "__main__":
    sys.exit(main())
