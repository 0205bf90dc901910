"""One rank of two that exchange a stage's output, which is freed while it is sent.

Rank 0 sends, frees, and uses the memory for something else before rank 1 receives. Writes
``WORLD-RANK.json``: of each exchange, whether what arrived is what was sent.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import schedules

from glm5_patch.attention.build import transformer_config
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.testing import cpu_host
from tests.tiny import hf_config

SHAPE, EXCHANGES = (48, 2, 64), 4


def main(rank: int, world: int, folder: Path) -> None:
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=1)
    )
    config = transformer_config(
        HFConfig(hf_config().to_dict()),
        transformer_impl="local",
        pipeline_model_parallel_size=world,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    with cpu_host.CudaLiterals():
        communicator = schedules.P2PCommunicator(torch.distributed.group.WORLD, config)
        arrived = [exchange(communicator, rank, number) for number in range(EXCHANGES)]
    (folder / f"{world}-{rank}.json").write_text(json.dumps(arrived))


def exchange(communicator, rank: int, number: int) -> bool:
    output = torch.full(SHAPE, float(number))
    if rank == 1:
        torch.distributed.barrier()
        received = communicator.recv_forward(SHAPE, False)
        torch.distributed.barrier()
        return torch.equal(received, output)
    _, works = communicator.send_forward_recv_forward(output, False, SHAPE, overlap_p2p_comm=True)
    schedules.deallocate_output_tensor(output, True)
    others = [torch.full(SHAPE, float("nan")) for _ in range(100)]
    torch.distributed.barrier()
    works["send_next"].wait()
    torch.distributed.barrier()
    return output.numel() == 1 and len(others) == 100
