"""Loading a checkpoint at size: time, peak host memory of each rank, and the disk's own rate.

    python benchmarks/checkpoint.py [--gigabytes 20] [--ranks 4] [--folder .]

Writes a synthetic checkpoint and lets each pipeline rank load its part of it, one rank after the
other and each in a process of its own (all at once need the memory of all). One sequential reader
shows the disk's rate before and after each rank, because a shared machine's changes. The page cache
is dropped before each reading. Needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 8 << 20
RAW = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_head_dim": 128,
    "index_n_heads": 8,
    "first_k_dense_replace": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def config(layers: int):
    from glm5_patch.config.huggingface import HFConfig

    return HFConfig({**RAW, "num_hidden_layers": layers})


def entries(layers: int):
    import torch

    from glm5_patch.checkpoint.names import expected_tensors
    from glm5_patch.checkpoint.writer import Entry

    fp32 = "e_score_correction_bias"
    return [
        Entry(name, torch.float32 if name.endswith(fp32) else torch.bfloat16, shape)
        for name, shape in expected_tensors(config(layers)).items()
    ]


def make(directory: Path, gigabytes: float, ranks: int) -> int:
    """Write the checkpoint; its bytes."""
    import torch

    from glm5_patch.checkpoint.staging import Staging
    from glm5_patch.checkpoint.writer import shards, write_index, write_shards

    one, two = (sum(entry.nbytes for entry in entries(n)) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one) + 1) // ranks) * ranks
    listed = sorted(entries(layers), key=lambda entry: -entry.dtype.itemsize)  # aligned
    random = torch.randint(-(1 << 15), 1 << 15, (1 << 25,), dtype=torch.int16).view(torch.bfloat16)

    def tensors():
        for number, entry in enumerate(listed):
            if entry.dtype is not torch.bfloat16:
                yield torch.rand(entry.shape)
                continue
            size, first = torch.Size(entry.shape).numel(), number * 4096 % (1 << 24)
            yield random[first : first + size].view(entry.shape)

    total = sum(entry.nbytes for entry in listed)
    staging = Staging(directory, {"benchmark": gigabytes}, total, anew=True)
    files = shards([listed])[0]
    write_shards(files, tensors(), staging)
    with staging.file("config.json") as target:
        target.write_text(json.dumps(config(layers).raw))
    staging.publish({"config.json", *write_index(files, staging)})
    return total


def uncached(directory: Path) -> list[Path]:
    """The files of weights, dropped from the page cache."""
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return files


def sequential_rate(directory: Path, first: float, last: float) -> float:
    """GB/s of one reader.

    Args:
        directory: of the checkpoint.
        first: where it starts to read, as a fraction of all bytes.
        last: where it ends.
    """
    buffer, read, passed = bytearray(BLOCK), 0, 0
    files = uncached(directory)
    total = sum(path.stat().st_size for path in files)
    start = time.perf_counter()
    for path in files:
        size = path.stat().st_size
        begin, end = (min(max(int(at * total) - passed, 0), size) for at in (first, last))
        passed += size
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while file.tell() < end and (count := file.readinto(buffer)):
                read += count
    return read / (time.perf_counter() - start) / 1e9


def memory(field: str) -> int:
    """Bytes that this process has resident now (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def load(directory: Path, rank: int, ranks: int) -> dict[str, float]:
    """In this process: what loading one pipeline rank's part takes."""
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from glm5_patch.attention.build import gpt_model, transformer_config
    from glm5_patch.checkpoint.reader import HFCheckpoint
    from glm5_patch.testing import cpu_host

    # The peers are not there: loading needs none of them.
    torch.distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    cpu_host.enable("cpu")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=ranks, create_gloo_process_groups=False
    )
    checkpoint = HFCheckpoint(directory)
    settings = transformer_config(
        checkpoint.config,
        transformer_impl="local",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        pipeline_model_parallel_size=ranks,
        moe_token_dispatcher_type="allgather",
    )
    ends = dict(pre_process=rank == 0, post_process=rank == ranks - 1)
    model = gpt_model(checkpoint.config, settings, **ends)
    own = sum(tensor.nbytes for tensor in model.parameters())
    before = memory("VmRSS")
    uncached(directory)
    start, cpu = time.perf_counter(), time.process_time()
    checkpoint.load_into(model, lambda note: print(f"rank {rank}: {note}", file=sys.stderr))
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    return {"own": own, "seconds": seconds, "cpu": cpu, "peak": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk in question")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(load(options.folder, options.rank, options.ranks)))
        return
    folder = Path(tempfile.mkdtemp(prefix=".glm5-checkpoint-", dir=options.folder))
    try:
        start = time.perf_counter()
        total = make(folder / "checkpoint", options.gigabytes, options.ranks)
        print(f"wrote {total / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
        print(f"torch {importlib.metadata.version('torch')}, {os.cpu_count()} CPUs")
        report(folder / "checkpoint", options.ranks, total)
    finally:
        shutil.rmtree(folder)


def report(directory: Path, ranks: int, total: int) -> None:
    rates = [sequential_rate(directory, 0, 1 / ranks)]
    print("rank   own GB       s   CPU s   GB/s  peak GB  above own GiB   disk")
    spent = 0.0
    for rank in range(ranks):
        command = [sys.executable, "-W", "ignore", __file__, "--rank", str(rank)]
        command += ["--ranks", str(ranks), "--folder", str(directory)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
        found = json.loads(done.stdout.splitlines()[-1])
        own, seconds, peak = found["own"], found["seconds"], found["peak"]
        rates.append(sequential_rate(directory, rank / ranks, (rank + 1) / ranks))
        row = f"{rank:4} {own / 1e9:8.2f} {seconds:7.1f} {found['cpu']:7.1f}"
        row += f" {own / seconds / 1e9:6.2f}"
        print(f"{row} {peak / 1e9:8.2f} {(peak - own) / 2**30:14.2f} {rates[-1]:6.2f}", flush=True)
        spent += seconds
    disk = len(rates) / sum(1 / rate for rate in rates)
    rate = total / spent / 1e9
    print(f"disk: {disk:.2f} GB/s ({rates[0]:.2f} before the first rank)")
    print(f"load: {rate:.2f} GB/s, {rate / disk:.0%} of the disk's rate")


if __name__ == "__main__":
    main()
