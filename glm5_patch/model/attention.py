"""Multi-latent attention whose sparse core shares one layer's top-k with the layers after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossAutoScaler,
    DSAIndexerLossLoggingHelper,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ..errors import GLM5PatchError
from .blocks import Rows
from .context_parallel import ContextParallel
from .indexer_loss import indexer_loss
from .schedule import IndexSchedule
from .sparse_attention import sparse_attention
from .topk_carrier import current_carrier, require_carrier


class CrossLayerDSAttention(MegatronModule):
    """Core attention of one layer: computes a top-k and publishes it, or reuses its source's.

    A skip layer has no indexer, hence no indexer parameters. Takes the place of the host's
    ``DSAttention``, with its constructor and forward.
    """

    observer: Callable[[int, Tensor], None] | None = None
    """Called with the layer number and the top-k that each forward attends to; for metrics."""

    def __init__(
        self,
        config,
        submodules,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str = "p2p",
        pg_collection=None,
    ) -> None:
        """Raises GLM5PatchError for a setting that would be computed wrongly."""
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise GLM5PatchError(f"attn_mask_type={attn_mask_type}: only a causal mask is possible")
        self.layer_number = layer_number
        self.schedule = IndexSchedule.from_megatron(config)
        # Layers of multi-token prediction are numbered after the decoder's, or from 0.18 on from 1
        # again. They run outside a block's forward, find no carrier, and share with no one.
        self.is_mtp = layer_number > self.schedule.num_layers
        self.source = layer_number if self.is_mtp else self.schedule.source(layer_number)
        self.softmax_scale = (k_channels or config.kv_channels) ** -0.5
        if softmax_scale is not None:
            self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.indexer = None
        if self.source == layer_number:
            self.indexer = build_module(
                submodules.indexer, config=config, pg_collection=pg_collection
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        x: Tensor,
        qr: Tensor,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Sparse attention of one layer.

        Args:
            query: [s, b, n, d], or packed [t, n, d]; heads of this tensor-parallel rank.
            key: as ``query``; under context parallelism of the whole sequence.
            value: as ``key``.
            attention_mask: ignored: the mask is causal, within documents if packed.
            x: hidden states [s, b, h] ([s / tp, b, h] under sequence parallelism).
            qr: normalised query latent [s, b, q_lora_rank] or [t, q_lora_rank].
            packed_seq_params: documents of a pack.

        Returns:
            [s, b, n * dv].

        Raises:
            MissingTopkError: a skip layer found no top-k of its source.
            GLM5PatchError: query and key differ in length (a KV cache).
        """
        if query.dim() == 3:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        split = None
        if self.cp_group is not None:
            split = ContextParallel(self.cp_group, packed_seq_params, len(query), query.device)
        rows = split.rows if split else Rows.of(packed_seq_params, len(query), query.device)
        if rows.keys != len(key):
            raise GLM5PatchError(
                f"layer {self.layer_number}: {len(query)} queries for {len(key)} keys; "
                "decoding with a KV cache is not supported, run whole sequences"
            )
        # No gradient flows from the indexer into the model.
        x, qr = x.detach(), qr.detach()
        wants_loss = (
            self.indexer is not None
            and self._loss_coefficient > 0
            and self.training
            and torch.is_grad_enabled()
        )
        with torch.set_grad_enabled(wants_loss):
            topk_indices, inputs = self._topk(x, qr, rows, packed_seq_params, split, wants_loss)
        if self.observer is not None:
            self.observer(self.layer_number, topk_indices)
        output = sparse_attention(query, key, value, topk_indices, rows, self.softmax_scale)
        if wants_loss:
            output = self._attach_loss(output, inputs, query, key, topk_indices, rows)
        return output

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    def _topk(self, x, qr, rows, packed_seq_params, split, wants_inputs: bool):
        """The top-k of this layer, and the indexer's inputs if wanted.

        A skip layer reads its source's. A computing layer publishes its own, and in a recompute
        takes the one found in the forward pass, so that both passes attend to the same keys and
        no second selection is paid for.
        """
        if self.indexer is None:
            carrier = require_carrier(self.layer_number, self.source)
            return carrier.read(self.layer_number, self.source), None
        carrier = None if self.is_mtp else current_carrier()
        topk_indices = None if carrier is None else carrier.published(self.layer_number)
        inputs = None
        if topk_indices is None or wants_inputs:
            inputs = self.indexer.inputs(x, qr, packed_seq_params, split)
        if topk_indices is None:
            topk_indices = self.indexer.select(inputs, rows)
            if carrier is not None:
                carrier.publish(self.layer_number, topk_indices, self.schedule)
        return topk_indices, inputs

    def _attach_loss(self, output, inputs, query, key, topk_indices, rows) -> Tensor:
        loss = indexer_loss(
            self.indexer,
            inputs,
            query.detach(),
            key.detach(),
            topk_indices,
            rows,
            softmax_scale=self.softmax_scale,
            coefficient=self._loss_coefficient,
            sparse=self.config.dsa_indexer_use_sparse_loss,
            per_token=self.config.calculate_per_token_loss,
        )
        DSAIndexerLossLoggingHelper.save_loss_to_tracker(
            loss=loss, layer_number=self.layer_number, num_layers=self.config.num_layers
        )
        return DSAIndexerLossAutoScaler.apply(output, loss)


class CrossLayerMLASelfAttention(MLASelfAttention):
    """The host's MLA, handing its sparse core what it needs under selective recompute too.

    The released megatron-core 0.16 to 0.18 pass ``x`` and ``qr`` to the core attention only
    outside ``_checkpointed_attention_forward``.
    """

    _core_inputs: tuple[Tensor, Tensor] | None = None

    def __init__(self, config, *args, **kwargs) -> None:
        """Raises GLM5PatchError for a recompute that can't be had with context parallelism."""
        super().__init__(config, *args, **kwargs)
        self._latent: Tensor | None = None
        if config.context_parallel_size > 1:
            if self.recompute_up_proj:
                raise GLM5PatchError(
                    "recompute_modules has 'mla_up_proj', which does not go with "
                    f"context_parallel_size={config.context_parallel_size}; take it out"
                )
            self.linear_kv_up_proj.register_forward_pre_hook(self._keep_latent)

    def _keep_latent(self, module, args) -> None:
        self._latent = args[0]

    def get_query_key_value_tensors(
        self,
        hidden_states,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        *args,
        **kwargs,
    ):
        query, key, value, *latents = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, *args, **kwargs
        )
        if self.config.context_parallel_size > 1:
            key, value = self._of_all_ranks(key, packed_seq_params)
        if self.checkpoint_core_attention and self.training:
            self._core_inputs = (hidden_states, latents[0])  # the normalised query latent
        return query, key, value, *latents

    def _of_all_ranks(self, key: Tensor, packed_seq_params) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, up-projected here from the gathered latent.

        Args:
            key: this rank's, [s / cp, b, n, nope + rope], or packed [t / cp, n, nope + rope].
        """
        (latent, self._latent), nope = (self._latent, None), self.config.qk_head_dim
        if packed_seq_params is not None:
            key, latent = key.unsqueeze(1), latent.view(-1, 1, latent.shape[-1])
        split = ContextParallel(self.pg_collection.cp, packed_seq_params, len(key), key.device)
        rope = split.gather(key[:, :, :1, nope:])  # the same in every head
        tp_size = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        up = self._up_project(split.gather_shards(latent))
        up = up.index_select(0, split.order(tp_size))
        up = up.unflatten(-1, (key.shape[2], nope + self.config.v_head_dim))
        key_nope, value = up.split([nope, self.config.v_head_dim], dim=-1)
        key = torch.cat([key_nope, rope.expand(-1, -1, key_nope.shape[2], -1)], dim=-1)
        if packed_seq_params is not None:
            key, value = key.squeeze(1), value.squeeze(1)
        return key, value

    def _up_project(self, latent: Tensor) -> Tensor:
        output = self.linear_kv_up_proj(latent)[0]
        self._latent = None
        return output

    def _checkpointed_attention_forward(
        self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs
    ):
        (x, qr), self._core_inputs = self._core_inputs, None

        def core(query, key, value, x, qr):
            return self.core_attention(
                query,
                key,
                value,
                attention_mask,
                x=x,
                qr=qr,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )

        return tensor_parallel.checkpoint(core, False, query, key, value, x, qr)
