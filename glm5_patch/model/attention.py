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
from .blocks import document_starts
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
        if config.context_parallel_size > 1:
            raise GLM5PatchError(
                f"context_parallel_size={config.context_parallel_size}: sparse attention over a "
                "sequence split between ranks is not supported on this host; set it to 1"
            )
        if attn_mask_type != AttnMaskType.causal:
            raise GLM5PatchError(f"attn_mask_type={attn_mask_type}: only a causal mask is possible")
        self.layer_number = layer_number
        self.schedule = IndexSchedule.from_megatron(config)
        # Layers of multi-token prediction are numbered after the decoder's and share with no one.
        self.is_mtp = layer_number > self.schedule.num_layers
        self.source = layer_number if self.is_mtp else self.schedule.source(layer_number)
        self.softmax_scale = (k_channels or config.kv_channels) ** -0.5
        if softmax_scale is not None:
            self.softmax_scale = softmax_scale
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
            key: as ``query``.
            value: [s, b, n, dv] or [t, n, dv].
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
        if query.shape[0] != key.shape[0]:
            raise GLM5PatchError(
                f"layer {self.layer_number}: {query.shape[0]} queries for {key.shape[0]} keys; "
                "decoding with a KV cache is not supported, run whole sequences"
            )
        starts = document_starts(packed_seq_params, query.shape[0], query.device)
        # No gradient flows from the indexer into the model.
        x, qr = x.detach(), qr.detach()
        wants_loss = (
            self.indexer is not None
            and self._loss_coefficient > 0
            and self.training
            and torch.is_grad_enabled()
        )
        with torch.set_grad_enabled(wants_loss):
            topk_indices, inputs = self._topk(x, qr, starts, packed_seq_params, wants_loss)
        if self.observer is not None:
            self.observer(self.layer_number, topk_indices)
        output = sparse_attention(query, key, value, topk_indices, starts, self.softmax_scale)
        if wants_loss:
            output = self._attach_loss(output, inputs, query, key, topk_indices, starts)
        return output

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    def _topk(self, x, qr, starts, packed_seq_params, wants_inputs: bool):
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
            inputs = self.indexer.inputs(x, qr, packed_seq_params)
        if topk_indices is None:
            topk_indices = self.indexer.select(inputs, starts)
            if carrier is not None:
                carrier.publish(self.layer_number, topk_indices, self.schedule)
        return topk_indices, inputs

    def _attach_loss(self, output, inputs, query, key, topk_indices, starts) -> Tensor:
        loss = indexer_loss(
            self.indexer,
            inputs,
            query.detach(),
            key.detach(),
            topk_indices,
            starts,
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

    def get_query_key_value_tensors(self, hidden_states, *args, **kwargs):
        result = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if self.checkpoint_core_attention and self.training:
            self._core_inputs = (hidden_states, result[3])  # result[3] is the query latent
        return result

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
