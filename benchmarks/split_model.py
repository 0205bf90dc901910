"""The model that multi_gpu.py splits, and the ways of splitting it."""

from __future__ import annotations

import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from glm5_patch import env
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.checkpoint.names import expected_tensors, own_part, pieces
from glm5_patch.config.huggingface import HFConfig

MICROBATCHES = 2
SHAPE = {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 7,
    "first_k_dense_replace": 3,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "num_nextn_predict_layers": 0,
    "vocab_size": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
}
TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=32,
    index_topk=16,
    index_head_dim=32,
    index_n_heads=4,
    num_experts_per_tok=2,
)


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def settings(
    device: str, tp: int, ep: int, cp: int, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Fields of the configuration beside the model's own; the device's usual dtype by default."""
    on_cpu, dtype = device == "cpu", dtype or dtype_on(device)
    found: dict[str, Any] = dict(
        transformer_impl="local",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        moe_token_dispatcher_type="allgather" if on_cpu else "alltoall",
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        context_parallel_size=cp,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        dsa_indexer_loss_coeff=0.001,
        dsa_indexer_use_sparse_loss=True,
    )
    if cp > 1:
        found["cp_comm_type"] = "allgather"
    return found


@dataclass(frozen=True)
class Split:
    """One way of splitting the model between all ranks."""

    name: str
    tp: int = 1
    cp: int = 1
    shares: str = "auto"
    """What tensor parallelism shares out."""
    alone: bool = False
    """Every rank runs the whole model and batch by itself."""

    @property
    def ep(self) -> int:
        return 1 if self.alone else torch.distributed.get_world_size()

    @property
    def dp(self) -> int:
        return torch.distributed.get_world_size() // (self.tp * self.cp)


def splits(ranks: int) -> list[Split]:
    """The ways of splitting the model, the reference first."""
    found = [Split("1 GPU", alone=True), Split(f"EP {ranks}")]
    for tp in (size for size in (2, 4, 8) if size <= ranks):
        for shares in ("tokens", "heads"):
            found.append(Split(f"TP {tp}, {shares}", tp=tp, shares=shares))
    return [*found, Split(f"CP {ranks}", cp=ranks)] if ranks > 1 else found[:1]


@contextmanager
def initialised(split: Split):
    """megatron-core's process groups for one split."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    os.environ[env.TENSOR_PARALLEL] = split.shares
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=split.tp,
        context_parallel_size=split.cp,
        expert_model_parallel_size=split.ep,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


class Model:
    """The model of one split, with its part of the weights and the gradient buffers."""

    def __init__(self, split: Split, device: str, experts: int, dtype: torch.dtype):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.split, self.device = split, torch.device(device)
        self.on_cpu = device == "cpu"
        self.dtype = dtype
        shape = {**SHAPE, "n_routed_experts": experts, **(TINY if self.on_cpu else {})}
        self.hf = HFConfig(shape)
        own = settings(device, split.tp, split.ep, split.cp, dtype)
        config = transformer_config(self.hf, **own)
        config.finalize_model_grads_func = None if split.alone else finalize_model_grads
        model = gpt_model(self.hf, config)
        as_trained = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=not split.alone
        )
        self.ddp = DistributedDataParallel(config, as_trained, model)
        config.no_sync_func = self.ddp.no_sync
        self.fill()
        self.microbatch = 0
        """The one that is running; its recompute too, since no other is in flight."""

    @torch.no_grad()
    def fill(self) -> None:
        """Random weights by name: the same on every split. Steps move the biases of routers."""
        shapes = expected_tensors(self.hf)
        for name, parameter, sources in pieces(self.ddp.module):
            whole = [self._random(source, shapes[source]) for source in sources]
            parameter.copy_(own_part(name, whole, parameter))

    def _random(self, name: str, shape) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device=self.device)
        if name.endswith("bias"):
            return values * 0.1
        if len(shape) == 1:
            return values * 0.1 + 1
        return (values * shape[-1] ** -0.5).to(self.dtype)

    def cores(self):
        """The sparse attention of each layer."""
        return [layer.self_attention.core_attention for layer in self.ddp.module.decoder.layers]

    def routers(self):
        """The router of each MoE layer, by layer number."""
        for layer in self.ddp.module.decoder.layers:
            if hasattr(layer.mlp, "router"):
                yield layer.layer_number, layer.mlp.router

    def positions(self, length: int) -> torch.Tensor:
        """Of this context-parallel rank's tokens, in zigzag order."""
        from megatron.core import parallel_state

        cp, rank = self.split.cp, parallel_state.get_context_parallel_rank()
        chunks = torch.arange(length).chunk(2 * cp)
        return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])

    def routed_positions(self, length: int) -> torch.Tensor:
        """Of the tokens that routers of this rank get: under sequence parallelism a share."""
        from megatron.core import parallel_state

        rank = parallel_state.get_tensor_model_parallel_rank()
        return self.positions(length).chunk(self.split.tp)[rank]

    def _microbatches(self, length: int):
        """This rank's: number, ids, labels and positions."""
        from megatron.core import parallel_state

        dp, dp_rank = self.split.dp, parallel_state.get_data_parallel_rank()
        numbers = range(MICROBATCHES) if self.split.alone else range(dp_rank, MICROBATCHES * dp, dp)
        own = self.positions(length)
        for number in (number % MICROBATCHES for number in numbers):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(self.hf.vocab_size, (1, length), generator=generator)
            rows = ids[:, own], ids.roll(-1, 1)[:, own], own[None]
            yield number, *(row.to(self.device) for row in rows)

    def step(self, length: int) -> None:
        """Forward and backward of all microbatches; gradients in the buffers."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def loss(output):
            own = output.float().sum() / (output.numel() * self.split.cp)
            return own, {"loss": own.detach()}

        def forward(iterator, model):
            self.microbatch, ids, labels, positions = next(iterator)
            return model(ids, positions, None, labels=labels), loss

        self.ddp.train()
        self.ddp.zero_grad_buffer()
        rows = list(self._microbatches(length))
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(rows),
            model=self.ddp,
            num_microbatches=len(rows),
            seq_length=length,
            micro_batch_size=1,
            decoder_seq_length=length,
            forward_only=False,
        )

    def gradients(self):
        """(name, parameter, the Hugging Face tensors that make it) of each with a gradient."""
        return [one for one in pieces(self.ddp.module) if hasattr(one[1], "main_grad")]
