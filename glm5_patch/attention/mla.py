"""Multi-latent attention that hands its core the latent instead of every head's keys and values.

64 heads of GLM-5 have keys and values of 32768 numbers a token; the latent they are made of, with
its rotary part, has 576. The core makes keys and values of it, or folds that into the queries.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.rotation.operation import rotate
from ..ops.sparse_attention.inputs import MLADims
from ..topk.tokens import Layout, token_group
from .rope import Rope


class CrossLayerMLASelfAttention(MLASelfAttention):
    """The host's module, parameters and forward. In its key slot stands the latent, in its value
    slot the up-projection, see ``CrossLayerDSAttention.attend``."""

    _core_inputs: tuple[Tensor, Tensor] | None = None
    """The hidden states and the query's latent of a forward whose core is checkpointed."""

    def __init__(self, config, *args, **kwargs) -> None:
        """Raises GLM5PatchError where the latent can't be split evenly between ranks."""
        super().__init__(config, *args, **kwargs)
        self.dims = MLADims.of(config)
        self.token_group = token_group(config, self.pg_collection)
        self._rope = Rope(config, self.rotary_pos_emb, "attention")
        tp_size = self.pg_collection.tp.size()
        if config.sequence_parallel and self.dims.latent % tp_size:
            raise GLM5PatchError(
                f"kv_lora_rank={self.dims.latent} is no multiple of tensor_model_parallel_size="
                f"{tp_size}, which sequence_parallel needs"
            )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        inference_context=None,
        *,
        inference_params=None,
    ):
        """Project, normalise, rotate.

        Args:
            hidden_states: [s, b, h], or [s / tp, b, h] under sequence parallelism.
            packed_seq_params: documents of a pack.

        Returns:
            In the host's order: query [s, b, n, nope + rope], latent [t, b, 1, latent + rope],
            up-projection [latent, n * (nope + value)], and the normalised latents of the query
            [s, b, q_lora_rank] and of keys and values [s, b, latent], both [s / tp, ...] under
            sequence parallelism. Where tokens are shared out, the query is of this rank's tokens,
            and n are all heads.

        Raises:
            GLM5PatchError: decoding with a KV cache.
        """
        if inference_context is not None or inference_params is not None:
            raise GLM5PatchError("decoding with a KV cache is not supported, run whole sequences")
        # Under sequence parallelism s is s / tp until ``_project``.
        q_latent = self.linear_q_down_proj(hidden_states)[0]  # [s, b, q_lora_rank]
        q_latent = self.q_layernorm(q_latent)
        latent = self.linear_kv_down_proj(hidden_states)[0]  # [s, b, latent + rope]
        # [s, b, latent], [s, b, rope]
        kv_latent, k_rope = latent.split([self.dims.latent, self.dims.rope], dim=-1)
        kv_latent = self.kv_layernorm(kv_latent)

        def project(q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor):
            return self._project(q_latent, kv_latent, k_rope, packed_seq_params)

        if self.recompute_up_proj:
            quantized = self.config.fp8 or self.config.fp4
            self.qkv_up_checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=quantized)
            project_once = project

            def project(*latents):
                return self.qkv_up_checkpoint.checkpoint(
                    lambda *latents: _all_need_grad(project_once(*latents)), *latents
                )

        query, latent, up_projection = project(q_latent, kv_latent, k_rope)
        if self.checkpoint_core_attention and self.training:
            self._core_inputs = (hidden_states, q_latent)
        return query, latent, up_projection, q_latent, kv_latent

    def _project(self, q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor, packed_seq_params):
        """The core's query, latent and up-projection, with positions rotated in."""
        dims, tp_group = self.dims, self.pg_collection.tp
        sequence_parts = tp_group.size() if self.config.sequence_parallel else 1
        layout = Layout.of(
            self.config,
            self.pg_collection.cp,
            packed_seq_params,
            len(q_latent) * sequence_parts,
            q_latent.device,
            self.token_group,
        )
        rotation = self._rope.rotation(layout, q_latent.dtype)

        # The heads, or tokens, of every rank see the whole latent: its gradient is their sum.
        if layout.token_group is None and tp_group.size() > 1:
            latent = torch.cat([kv_latent, k_rope], dim=-1)  # [s, b, latent + rope]
            if self.config.sequence_parallel:
                # [s / tp, b, latent + rope] -> [s, b, latent + rope]
                latent = gather_from_sequence_parallel_region(latent, group=tp_group)
            else:
                latent = copy_to_tensor_model_parallel_region(latent, group=tp_group)
            # [s, b, latent], [s, b, rope]
            kv_latent, k_rope = latent.split([dims.latent, dims.rope], dim=-1)
        k_rope = rotate(k_rope[:, :, None, None], rotation, first=0)  # [own, b, 1, rope]
        latent = torch.cat([kv_latent.unsqueeze(2), k_rope], dim=-1)  # [own, b, 1, latent + rope]
        # What is gathered comes while the queries are projected.
        latent = layout.gather(latent)
        basis = layout.once(("basis", q_latent.dtype), lambda: self._basis(q_latent))
        up_projection = layout.gather_heads(self._up_projection(basis).t())

        def make_query() -> Tensor:
            query = self.linear_q_up_proj(q_latent)[0]  # [s, b, n * (nope + rope)]
            query = layout.all_heads(query, dims.nope + dims.rope)  # [own, b, tp, n, nope + rope]
            return rotate(query, rotation, first=dims.nope)  # [own, b, tp * n, nope + rope]

        query = make_query()
        self.core_attention.make_query = make_query if self._makes_query_again else None
        # [t, b, 1, latent + rope], [latent, tp * n * (nope + value)]
        return query, latent.wait(), up_projection.wait().t()

    @property
    def _makes_query_again(self) -> bool:
        """Whether the query of a forward can be made a second time, and is the same then."""
        if self.recompute_up_proj or not torch.is_grad_enabled():
            return False
        dropouts = (m.p for m in self.linear_q_up_proj.modules() if isinstance(m, torch.nn.Dropout))
        return not (self.config.fp8 or self.config.fp4 or any(dropouts))

    def _basis(self, like: Tensor) -> Tensor:
        """An identity, [latent, latent]."""
        return torch.eye(self.dims.latent, dtype=like.dtype, device=like.device)

    def _up_projection(self, basis: Tensor) -> Tensor:
        """What ``linear_kv_up_proj`` multiplies by, [latent, n * (nope + value)].

        Asked of the module itself, by handing it the identity: whatever wraps it (an adapter), its
        hooks and its gradient's way count.
        """
        module, tp = self.linear_kv_up_proj, self.pg_collection.tp
        # A column-parallel layer: [latent, 1, latent] -> [latent, 1, n * (nope + value)]
        if not self.config.sequence_parallel:
            up_projection = module(basis.unsqueeze(1))[0]
        elif _is_the_hosts_alone(module):
            # Split, the identity would be gathered in the forward and again in the backward.
            module.sequence_parallel = False
            try:
                up_projection = module(basis.unsqueeze(1))[0]
            finally:
                module.sequence_parallel = True
        else:
            own = basis.chunk(tp.size())[tp.rank()]  # [latent / tp, latent]
            up_projection = module(own.unsqueeze(1))[0]
        return up_projection.squeeze(1)  # [latent, n * (nope + value)]

    def _run_core_attention(
        self,
        query,
        key,
        value,
        attention_mask,
        packed_seq_params=None,
        attn_mask_type=None,
        **inputs,
    ):
        """The host's slots. megatron-core 0.19 pads ``value`` for a pack here: that would pad the
        up-projection."""
        return self.core_attention(
            query,
            key,
            value,
            attention_mask,
            packed_seq_params=packed_seq_params,
            attn_mask_type=attn_mask_type or self.attn_mask_type,
            **inputs,
        )

    def _checkpointed_attention_forward(
        self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs
    ):
        """The host's slots. megatron-core 0.16 to 0.18 give the core no ``x`` and ``qr`` here."""
        (hidden_states, q_latent), self._core_inputs = self._core_inputs, None

        def core(query, latent, up_projection, hidden_states, q_latent):
            return self.core_attention(
                query,
                latent,
                up_projection,
                attention_mask,
                x=hidden_states,
                qr=q_latent,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )

        latent, up_projection = key, value
        # The core only selects by these two. Inputs that need a gradient are freed after the
        # recompute by verl, and the projections still need these.
        selects_by = hidden_states.detach(), q_latent.detach()
        return tensor_parallel.checkpoint(core, False, query, latent, up_projection, *selects_by)


def _all_need_grad(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Where gradients are recorded, outputs of frozen parameters alone need one too: the host's
    checkpoint runs the backward of every output of its recompute."""
    if not torch.is_grad_enabled():
        return outputs
    return tuple(t if t.requires_grad else t.detach().requires_grad_() for t in outputs)


def _is_the_hosts_alone(linear: torch.nn.Module) -> bool:
    """Whether nothing but megatron-core's own column-parallel layer sees its input."""
    hooked = linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear)
    return type(linear) is ColumnParallelLinear and linear.sequence_parallel and not hooked
