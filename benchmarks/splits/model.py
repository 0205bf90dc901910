"""The model that multi_gpu.py splits, and the ways of splitting it."""

from __future__ import annotations

import copy
import os
import zlib
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from glm5_patch import env
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.checkpoint.names import expected_tensors, own_part, pieces
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.pipeline_split import equal_middle_split
from glm5_patch.topk.carrier import current_carrier

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
TRANSFORMER_ENGINE = dict(
    transformer_impl="transformer_engine",
    bias_activation_fusion=True,
    gradient_accumulation_fusion=True,
    moe_grouped_gemm=True,
    moe_permute_fusion=True,
)
"""Fields of the configuration, as Megatron-LM's scripts have them."""


class Shape(NamedTuple):
    """What a run may change of the model and of its step."""

    layers: int = 7
    experts: int = 8
    """Routed experts of a MoE layer; 0: every layer is dense."""
    microbatches: int = MICROBATCHES
    vocabulary: int | None = None
    """None: the usual one."""
    offload: bool = False
    """Top-k and inputs of recomputed layers wait in host memory."""
    dispatcher: str | None = None
    """How tokens reach their experts: "alltoall", a copy of a token for each of its experts, or
    "allgather", every token to every rank. None: the device's usual one."""
    shared_experts_beside: bool = False
    """They run beside the exchange of the others, in a stream of their own."""
    impl: str = "local"
    """Whose modules: "local", or "transformer_engine" with its fusions."""

    def settings(self) -> dict[str, Any]:
        """What it says of megatron-core's configuration."""
        found = dict(dsa_topk_offload=self.offload)
        if self.impl == "transformer_engine":
            found.update(TRANSFORMER_ENGINE)
        if self.experts:
            found["moe_shared_expert_overlap"] = self.shared_experts_beside
            if self.dispatcher is not None:
                found["moe_token_dispatcher_type"] = self.dispatcher
        return found

    def config(self, on_cpu: bool) -> HFConfig:
        """The model's."""
        sizes = {"num_hidden_layers": self.layers, "n_routed_experts": self.experts}
        if not self.experts:
            sizes = {"num_hidden_layers": self.layers, "first_k_dense_replace": self.layers}
        if self.vocabulary is not None:
            sizes["vocab_size"] = self.vocabulary
        return HFConfig({**SHAPE, **(TINY if on_cpu else {}), **sizes})


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def inputs_kept(offload: bool, device: str) -> AbstractContextManager:
    """Around a forward: where inputs of recomputed layers wait for the backward."""
    if not offload:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device != "cpu")


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
    pp: int = 1
    shares: str = "auto"
    """What tensor parallelism shares out."""
    alone: bool = False
    """Every rank runs the whole model and batch by itself."""

    @property
    def ep(self) -> int:
        """How many ranks share the experts out, if the model has any."""
        return 1 if self.alone else torch.distributed.get_world_size() // self.pp

    @property
    def dp(self) -> int:
        return torch.distributed.get_world_size() // (self.tp * self.cp * self.pp)

    def stages(self, hf: HFConfig) -> dict[str, Any]:
        """Fields of the configuration for the pipeline: stages may start on any layer."""
        if self.pp == 1:
            return {}
        layers = equal_middle_split(hf.schedule, self.pp, any_layer=True)
        return dict(
            pipeline_model_parallel_size=self.pp,
            num_layers_in_first_pipeline_stage=layers[0],
            num_layers_in_last_pipeline_stage=layers[-1],
            dsa_topk_across_stages=True,
            deallocate_pipeline_outputs=True,
        )


def splits(ranks: int, shape: Shape) -> list[Split]:
    """The ways of splitting the model, the reference first."""
    found = [Split("1 GPU", alone=True)]
    if ranks == 1:
        return found
    found.append(Split(f"{'EP' if shape.experts else 'DP'} {ranks}"))
    sizes = [size for size in (2, 4, 8) if size <= ranks]
    for tp in sizes:
        for shares in ("tokens", "heads"):
            found.append(Split(f"TP {tp}, {shares}", tp=tp, shares=shares))
    found += [Split(f"PP {pp}", pp=pp) for pp in sizes if pp <= shape.layers]
    return [*found, Split(f"CP {ranks}", cp=ranks)]


@contextmanager
def initialised(split: Split, shape: Shape):
    """megatron-core's process groups for one split of a model."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    os.environ[env.TENSOR_PARALLEL] = split.shares
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=split.tp,
        context_parallel_size=split.cp,
        pipeline_model_parallel_size=split.pp,
        expert_model_parallel_size=split.ep if shape.experts else 1,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextmanager
def output_layer_unfused():
    """The output layer, megatron-core's own in every model, adds to its gradient without Apex."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    build = ColumnParallelLinear.__init__

    def unfused(self, *args, config, **kwargs):
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False
        build(self, *args, config=own, **kwargs)

    with mock.patch.object(ColumnParallelLinear, "__init__", unfused):
        yield


class Model:
    """The model of one split, with its part of the weights and the gradient buffers."""

    def __init__(self, split: Split, device: str, shape: Shape, dtype: torch.dtype):
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.split, self.shape, self.device = split, shape, torch.device(device)
        self.dtype = dtype
        self.hf = shape.config(on_cpu=device == "cpu")
        own = settings(device, split.tp, split.ep if shape.experts else 1, split.cp, dtype)
        own.update(shape.settings())
        config = transformer_config(self.hf, **own, pipeline_dtype=dtype, **split.stages(self.hf))
        config.finalize_model_grads_func = None if split.alone else finalize_model_grads
        with output_layer_unfused():
            model = gpt_model(
                self.hf,
                config,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        as_trained = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=not split.alone
        )
        self.ddp = DistributedDataParallel(config, as_trained, model)
        config.no_sync_func = self.ddp.no_sync
        self.fill()
        self._begun = 0

    @property
    def microbatch(self) -> int:
        """The one whose forward, or recompute, is running: a pipeline has several in flight."""
        return vars(current_carrier()).setdefault("microbatch", self._begun)

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

    def experts(self) -> list[torch.nn.Module]:
        """What has the experts of each MoE layer."""
        layers = self.ddp.module.decoder.layers
        return [layer.mlp.experts for layer in layers if hasattr(layer.mlp, "experts")]

    def routers(self):
        """The router of each MoE layer, by layer number."""
        for layer in self.ddp.module.decoder.layers:
            if hasattr(layer.mlp, "router"):
                yield layer.layer_number, layer.mlp.router

    def positions(self, length: int) -> torch.Tensor:
        """Of this context-parallel rank's tokens, in zigzag order.

        Raises:
            ValueError: the ranks can't have equal parts.
        """
        from megatron.core import parallel_state

        parts = 2 * self.split.cp * self.split.tp
        if length % parts:
            raise ValueError(f"{length} tokens: {self.split.name} needs a multiple of {parts}")
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
        count = self.shape.microbatches
        numbers = range(count) if self.split.alone else range(dp_rank, count * dp, dp)
        own = self.positions(length)
        for number in (number % count for number in numbers):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(self.hf.vocab_size, (1, length), generator=generator)
            rows = ids[:, own], ids.roll(-1, 1)[:, own], own[None]
            yield number, *(row.to(self.device) for row in rows)

    def step(self, length: int) -> torch.Tensor:
        """Forward and backward of all microbatches; gradients in the buffers.

        Returns:
            This rank's part of the mean loss, fp32 []: 0 where a pipeline goes on.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def loss(output):
            own = output.float().sum() / (output.numel() * self.split.cp)
            return own, {"loss": own.detach().clone()}  # the schedule scales the first in place

        def forward(iterator, model):
            self._begun, ids, labels, positions = next(iterator)
            with inputs_kept(self.shape.offload, self.device.type):
                return model(ids, positions, None, labels=labels), loss

        self.ddp.train()
        self.ddp.zero_grad_buffer()
        rows = list(self._microbatches(length))
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(rows),
            model=self.ddp,
            num_microbatches=len(rows),
            seq_length=length,
            micro_batch_size=1,
            decoder_seq_length=length,
            forward_only=False,
        )
        parts = [one["loss"] for one in found]
        return torch.stack(parts).mean() if parts else torch.zeros((), device=self.device)

    def loss(self, own: torch.Tensor) -> float:
        """The mean over all ranks' microbatches of what ``step`` returned."""
        whole = own.clone()
        torch.distributed.all_reduce(whole)
        return whole.item() / (self.split.dp * self.split.tp)

    def gradients(self):
        """(name, parameter, the Hugging Face tensors that make it) of each with a gradient."""
        return [one for one in pieces(self.ddp.module) if hasattr(one[1], "main_grad")]
