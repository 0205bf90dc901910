"""A GLM-5.2-shaped model of 7 layers over any number of GPUs, under torchrun.

    python benchmarks/multi_gpu_training.py
    torchrun --nproc-per-node 4 benchmarks/multi_gpu_training.py --tp 4 --ep 4
    torchrun --nproc-per-node 4 benchmarks/multi_gpu_training.py --tp 2 --pp 2
    torchrun --nproc-per-node 4 benchmarks/multi_gpu_training.py --tp 2 --cp 2 --thd
    torchrun --nproc-per-node 2 benchmarks/multi_gpu_training.py --pp 2 --first-stage 4

Layers 1, 2, 3 and 7 compute their top-k; the others have no indexer, in the model and in the
checkpoint. A random checkpoint is written to --folder once, in Hugging Face's format. Every run
loads it, each rank its part; trains 10 full steps, saves a distributed checkpoint, and trains 10
more with adapters on the latent projections and all else frozen. Full recompute, megatron-core's
schedules, no Transformer Engine. With --pp 2 the first stage has 6 layers; with --first-stage 4 the
second one starts on layer 5, a skip layer, and the first one sends it the top-k. It prints tokens
per second of fused and of blocked kernels, the share of the layers' forward that is sparse
attention, the share of a step that sending the top-k takes, and each rank's peak memory, and exits
1 if a loss does not fall. On the CPU (gloo, fp32, tiny widths): --device cpu. multi_gpu.py compares
gradients and rates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from splits.model import MICROBATCHES, SHAPE, TINY, dtype_on, settings

import glm5_patch
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.checkpoint.names import expected_tensors
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.staging import Staging
from glm5_patch.checkpoint.writer import Entry, shards, write_index, write_shards
from glm5_patch.config.costs import topk_bytes_per_token
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.testing import cpu_host
from glm5_patch.training.phases import set_phase

STEPS, RANK = 10, 16


def say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(line, flush=True)


class Adapter(torch.nn.Module):
    """A low-rank addition to a linear layer whose weight every rank has whole."""

    def __init__(self, linear, rank: int = RANK):
        super().__init__()
        self.to_wrap = linear
        rows, columns = linear.weight.shape
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        down = torch.randn(rank, columns, generator=torch.Generator().manual_seed(0))
        self.adapter = torch.nn.ParameterDict(
            {
                "down": torch.nn.Parameter((down * columns**-0.5).to(**like)),
                "up": torch.nn.Parameter(torch.zeros(rows, rank, **like)),
            }
        )
        for parameter in self.adapter.values():
            parameter.sequence_parallel = linear.config.sequence_parallel

    def forward(self, x):
        output, bias = self.to_wrap(x)
        return output + x @ self.adapter["down"].T @ self.adapter["up"].T, bias


class Run:
    """One split of the model."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.dtype = dtype_on(options.device)
        shape = {**SHAPE, "n_routed_experts": options.experts}
        self.hf = HFConfig({**shape, **TINY} if options.device == "cpu" else shape)
        self.source = options.folder / "checkpoint"
        self.failed: list[str] = []

    @property
    def topk_crosses(self) -> bool:
        """Whether the second stage starts on a skip layer."""
        schedule, first = self.hf.schedule, self.options.first_stage
        return self.options.pp == 2 and not schedule.computes(first + 1)

    def check(self, what: str, measured: str, passed: bool) -> None:
        say(f"{'ok    ' if passed else 'FAILED'} {what}: {measured}")
        if not passed:
            self.failed.append(what)

    def write_checkpoint(self) -> None:
        """Once, by rank 0: indexers on computing layers only."""
        if torch.distributed.get_rank() == 0 and not self.source.exists():
            say(f"writing a random checkpoint to {self.source}")
            generator = torch.Generator(self.device).manual_seed(0)
            entries = [
                Entry(name, self.dtype, shape) for name, shape in expected_tensors(self.hf).items()
            ]
            staging = Staging(self.source, {"benchmark": str(self.source)}, anew=True)
            (files,) = shards([entries])
            tensors = (self._random(entry.name, entry.shape, generator) for entry in entries)
            write_shards(files, tensors, staging)
            with staging.file("config.json") as target:
                target.write_text(json.dumps(self.hf.raw))
            staging.publish({"config.json", *write_index(files, staging)})
        torch.distributed.barrier()

    def _random(self, name: str, shape, generator) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=self.device)
        if name.endswith("bias"):
            values *= 0.1
        elif len(shape) == 1:
            values = values * 0.1 + 1
        else:
            values *= shape[-1] ** -0.5
        return values.to(self.dtype).cpu()

    def build(self):
        """This rank's model, loaded."""
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads

        options = self.options
        first = options.first_stage
        stages = dict(
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=self.hf.num_hidden_layers - first,
            dsa_topk_across_stages=self.topk_crosses,
        )
        split = settings(options.device, options.tp, options.ep, options.cp)
        split |= dict(
            pipeline_dtype=self.dtype,
            expert_tensor_parallel_size=options.etp,
            pipeline_model_parallel_size=options.pp,
            deallocate_pipeline_outputs=True,
        )
        config = transformer_config(self.hf, **split, **(stages if options.pp == 2 else {}))
        config.finalize_model_grads_func = finalize_model_grads
        model = gpt_model(
            self.hf,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        report = HFCheckpoint(self.source).load_into(model)
        indexers = sorted(
            layer.layer_number
            for layer in model.decoder.layers
            if layer.self_attention.core_attention.indexer is not None
        )
        everywhere = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, indexers)
        found = sorted({number for one in everywhere for number in one})
        say(f"loaded: {report}")
        self.check("layers with an indexer", f"{found}", found == [1, 2, 3, 7])
        return model

    def wrap(self, model):
        """With the gradient buffers of megatron-core's data parallelism."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        return DistributedDataParallel(model.config, settings, model)

    def batch(self):
        """This rank's microbatches: ids, labels, positions and pack; the same on every split."""
        from megatron.core import parallel_state
        from megatron.core.packed_seq_params import PackedSeqParams

        s, size = self.options.seq_length, parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        dp, dp_rank = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        for number in range(dp_rank, MICROBATCHES * max(1, dp), dp):
            generator = torch.Generator().manual_seed(number % MICROBATCHES)
            ids = torch.randint(self.hf.vocab_size, (1, s), generator=generator)
            lengths = [s // 4, s // 2, s // 4] if self.options.thd else [s]
            documents = torch.arange(s).split(lengths)
            chunks = [document.chunk(2 * size) for document in documents]
            own = torch.cat([torch.cat([c[rank], c[2 * size - 1 - rank]]) for c in chunks])
            positions = torch.cat([torch.arange(n) for n in lengths])
            pack = None
            if self.options.thd:
                bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
                bounds = bounds.to(self.device)
                pack = PackedSeqParams(
                    qkv_format="thd",
                    cu_seqlens_q=bounds,
                    cu_seqlens_kv=bounds,
                    max_seqlen_q=max(lengths),
                    max_seqlen_kv=max(lengths),
                )
            labels = ids.roll(-1, 1)
            rows = (ids[:, own], labels[:, own], positions[own][None])
            yield (*(row.to(self.device) for row in rows), pack)

    def forward_backward(self, ddp) -> float:
        """One step's loss, gradients in the buffers; the loss on every rank."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def loss(output):
            cp = parallel_state.get_context_parallel_world_size()
            own = output.float().sum() / (output.numel() * cp)
            whole = own.detach().clone()
            torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
            return own, {"loss": whole}

        def step(iterator, model):
            ids, labels, positions, pack = next(iterator)
            return model(ids, positions, None, labels=labels, packed_seq_params=pack), loss

        ddp.train()
        ddp.zero_grad_buffer()
        rows = list(self.batch())
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(rows),
            model=ddp,
            num_microbatches=len(rows),
            seq_length=self.options.seq_length,
            micro_batch_size=1,
            decoder_seq_length=self.options.seq_length,
            forward_only=False,
        )
        mean = sum(one["loss"].item() for one in found) / max(1, len(found))
        everywhere = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, mean if found else None)
        means = [one for one in everywhere if one is not None]
        return sum(means) / len(means)

    def train(self, ddp, label: str, rate: float) -> None:
        parameters = [p for p in ddp.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, foreach=False)
        losses = []
        for number in range(STEPS):
            losses.append(self.forward_backward(ddp))
            for parameter in parameters:
                parameter.grad = parameter.main_grad.to(parameter.dtype)
            optimizer.step()
            optimizer.zero_grad()
            say(f"{label}: step {number + 1} of {STEPS}, loss {losses[-1]:.4f}")
        text = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
        self.check(f"{label}: the loss falls", text, losses[-1] < losses[0])

    def seconds(self, run, times: int = 3) -> float:
        run()
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self._wait()
        return (time.perf_counter() - start) / times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def measure(self, ddp) -> None:
        tokens = self.options.seq_length * MICROBATCHES * self.options.dp
        rates = {}
        # On megatron-core 0.19 what they replace is the host's own code, of quadratic memory.
        comparable = glm5_patch.status()["dsa_spec"].state == "applied"
        for kernels in ("auto", "torch") if comparable else ("auto",):
            os.environ["GLM5_PATCH_KERNELS"] = kernels
            seconds = self.seconds(lambda: self.forward_backward(ddp))
            rates[kernels] = seconds
            say(
                f"kernels {kernels}: {tokens / seconds:.0f} tokens/s, {seconds * 1e3:.0f} ms a step"
            )
        os.environ["GLM5_PATCH_KERNELS"] = "auto"
        if comparable:
            say(f"fused kernels: {rates['torch'] / rates['auto']:.2f} times the blocked ones' rate")
        say(f"sparse attention: {self._attention_share(ddp):.0%} of a forward on this rank")
        if self.topk_crosses:
            self._say_what_sending_takes(rates["auto"])
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            peaks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(peaks, peak)
            say("peak memory per rank: " + ", ".join(f"{gib:.1f} GiB" for gib in peaks))

    def _say_what_sending_takes(self, step_seconds: float) -> None:
        """Of a step: each microbatch's top-k crosses once, beside the hidden states."""
        from megatron.core import parallel_state

        options, h = self.options, self.hf.hidden_size
        longest = options.seq_length // 2 if options.thd else options.seq_length
        extra = topk_bytes_per_token(self.hf.index_topk, longest) // self.dtype.itemsize
        tokens = options.seq_length // options.cp // options.tp
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = torch.distributed.get_process_group_ranks(group)

        def crossing(width):
            tensor = torch.zeros(tokens, 1, width, dtype=self.dtype, device=self.device)

            def run():
                if parallel_state.is_pipeline_first_stage():
                    torch.distributed.send(tensor, ranks[1], group)
                else:
                    torch.distributed.recv(tensor, ranks[0], group)

            return self.seconds(run, times=20)

        hidden, both = crossing(h), crossing(h + extra)
        share = MICROBATCHES * (both - hidden) / step_seconds
        say(
            f"sending one microbatch: hidden states {hidden * 1e3:.2f} ms, with the top-k "
            f"{both * 1e3:.2f} ms; the top-k takes {share:.2%} of a step"
        )

    def _attention_share(self, ddp) -> float:
        """Of rank 0's layers, by their time alone."""
        spent = {"layer": 0.0, "core": 0.0}
        handles = []

        def timed(module, kind):
            def before(*_):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                module.started = time.perf_counter()

            def after(*_):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent[kind] += time.perf_counter() - module.started

            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))

        for layer in ddp.module.decoder.layers:
            timed(layer, "layer")
            timed(layer.self_attention.core_attention, "core")
        self.forward_backward(ddp)
        for handle in handles:
            handle.remove()
        return spent["core"] / spent["layer"]

    def save(self, model) -> None:
        from megatron.core import dist_checkpointing

        folder = self.options.folder / "trained"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))
        say(f"saved to {folder}")

    def all(self) -> list[str]:
        self.write_checkpoint()
        model = self.build()
        ddp = self.wrap(model)
        self.forward_backward(ddp)
        self.measure(ddp)
        self.train(ddp, "full", 1e-4 if self.device.type == "cuda" else 1e-3)
        self.save(model)
        for layer in model.decoder.layers:
            attention = layer.self_attention
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                setattr(attention, name, Adapter(getattr(attention, name)))
        set_phase(model, "frozen_indexer")
        if model.pre_process:  # a checkpoint whose input needs no gradient has none for its weights
            model.embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())
        self.train(self.wrap(model), "LoRA", 1e-3)
        return self.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name in ("tp", "pp", "ep", "cp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument(
        "--first-stage", type=int, default=6, choices=range(1, 7), help="its layers of --pp 2 (6)"
    )
    parser.add_argument("--thd", action="store_true", help="packs of three documents")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--experts", type=int, default=16, help="routed experts (16)")
    parser.add_argument("--seq-length", type=int, help="tokens of a microbatch (8192; 64 on cpu)")
    parser.add_argument("--folder", type=Path, default=Path("multi-gpu"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/multi_gpu_training.py needs a CUDA device, or --device cpu", file=sys.stderr
        )
        return 2
    world = int(os.environ.get("WORLD_SIZE", 1))
    split = options.tp * options.pp * options.cp
    if world % split:
        print(f"--tp * --pp * --cp is {split}, which {world} ranks can't hold", file=sys.stderr)
        return 2
    options.dp = world // split
    options.etp = 1 if options.ep > 1 else options.tp
    options.seq_length = options.seq_length or (8192 if options.device == "cuda" else 64)
    on_cpu = options.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
        cpu_host.enable()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            "gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1
        )
    else:
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    glm5_patch.require()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        context_parallel_size=options.cp,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.etp,
    )
    model_parallel_cuda_manual_seed(1)
    with cpu_host.CudaLiterals() if on_cpu else nullcontext():
        failed = Run(options).all()
    say(f"FAILED: {', '.join(failed)}" if failed else f"passed on {world} ranks")
    torch.distributed.destroy_process_group()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
