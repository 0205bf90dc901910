"""One rank of a training step in which the host must not wait for its GPU.

Tensor parallelism over the world, with sequence parallelism. Writes ``WORLD-RANK.json``: an error,
or nothing. Without a GPU for each rank it runs the same step on the CPU, where nothing is counted.
"""

from __future__ import annotations

import json
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from glm5_patch.attention.build import gpt_model
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.testing import cpu_host
from tests.distributed.cases import FULL
from tests.tiny import hf_config, megatron_config

LENGTH, WARM_UP = 512, 2
WIDTHS = dict(
    num_hidden_layers=4,
    first_k_dense_replace=4,  # the host's token dispatcher waits for the GPU
    num_attention_heads=16,
    num_key_value_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    index_n_heads=16,
    index_head_dim=128,
)
"""What the kernels take."""


def main(rank: int, world: int, folder: Path) -> None:
    on_gpu = torch.cuda.device_count() >= world
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world
    )
    found = {}
    try:
        with nullcontext() if on_gpu else cpu_host.CudaLiterals():
            step(world, on_gpu)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))


def step(world: int, on_gpu: bool) -> None:
    """Forward and backward of the layers, a few times; the last may not wait."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    hf = HFConfig(hf_config(index_topk=64, **WIDTHS).to_dict())
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = megatron_config(
        hf,
        params_dtype=dtype,
        bf16=on_gpu,
        use_cpu_initialization=not on_gpu,
        perform_initialization=True,
        tensor_model_parallel_size=world,
        sequence_parallel=world > 1,
        dsa_indexer_loss_coeff=0.1,
        dsa_indexer_use_sparse_loss=True,
        **FULL,
    )
    layers = gpt_model(hf, config).decoder.train()
    device = "cuda" if on_gpu else "cpu"
    shape = LENGTH // world, 1, hf.hidden_size
    hidden_states = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    for number in range(WARM_UP + 1):
        if on_gpu and number == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        layers(hidden_states, attention_mask=None).float().square().mean().backward()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
