"""The sparse core of multi-latent attention, sharing one layer's top-k with the layers after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossAutoScaler,
    DSAIndexerLossLoggingHelper,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.index_loss.operation import index_loss
from ..ops.index_topk.reference import IndexerInputs
from ..ops.query_positions import visible_topk
from ..ops.sparse_attention.inputs import AttentionInputs, MLADims
from ..ops.sparse_attention.operation import sparse_attention
from ..topk.source import TopkSource
from ..topk.tokens import Layout
from .mask import require_causal


class CrossLayerDSAttention(MegatronModule):
    """Core attention of one layer: computes a top-k and publishes it, or reuses its source's.

    A skip layer has no indexer, hence no indexer parameters. Takes the place of the host's
    ``DSAttention``, with its constructor and its ``forward``; ``attend`` has the names of what
    ``CrossLayerMLASelfAttention`` passes.
    """

    requires_dsa_inputs = True
    """megatron-core 0.19 on asks for it: whether ``forward`` takes ``x`` and ``qr``."""

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
        is_mtp_layer: bool = False,
    ) -> None:
        """Has the constructor of the host's ``DSAttention``.

        Args:
            is_mtp_layer: of megatron-core's dev branch. Not read: where the layer is built tells
                the same on every core, see ``topk.mtp``.

        Raises:
            GLM5PatchError: a setting would be computed wrongly.
        """
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise GLM5PatchError(f"attn_mask_type={attn_mask_type}: only a causal mask is possible")
        self.layer_number = layer_number
        self.topk_source = TopkSource(config, layer_number)
        self.softmax_scale = (k_channels or config.kv_channels) ** -0.5
        if softmax_scale is not None:
            self.softmax_scale = softmax_scale
        self.dims = MLADims.of(config)
        self.cp_group = None if pg_collection is None else pg_collection.cp
        self.indexer = None
        if self.topk_source.computes:
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
        """The host's slots; see ``attend``, whose names say what stands in them."""
        return self.attend(
            query,  # [s, b, n, nope + rope]
            latent=key,  # [t, b, 1, latent + rope]
            up_projection=value,  # [latent, n * (nope + value)]
            hidden_states=x,  # [s, b, h]
            q_latent=qr,  # [s, b, q_lora_rank]
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
        )

    def attend(
        self,
        query: Tensor,
        latent: Tensor,
        up_projection: Tensor,
        hidden_states: Tensor,
        q_latent: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params,
    ) -> Tensor:
        """Sparse attention of one layer.

        Args:
            query: [s, b, n, nope + rope]; heads of this tensor-parallel rank.
            latent: [t, b, 1, latent + rope]; under context parallelism of the whole sequence.
            up_projection: makes keys and values of the latent, [latent, n * (nope + value)].
            hidden_states: [s, b, h] ([s / tp, b, h] under sequence parallelism).
            q_latent: normalised, [s, b, q_lora_rank] likewise.
            attention_mask: checked, see ``require_causal``: the mask is causal, within documents if
                packed.
            packed_seq_params: documents of a pack.

        Returns:
            [s, b, n * value].

        Raises:
            MissingTopkError: a skip layer found no top-k of its source.
            GLM5PatchError: query and latent differ in length (a KV cache), or the mask is another.
        """
        layout = Layout.of(self.config, self.cp_group, packed_seq_params, len(query), query.device)
        if layout.queries.keys != len(latent):
            raise GLM5PatchError(
                f"layer {self.layer_number}: {len(query)} queries for {len(latent)} keys; "
                "decoding with a KV cache is not supported, run whole sequences"
            )
        require_causal(attention_mask, layout.queries)
        # No gradient flows from the indexer into the model.
        hidden_states, q_latent = hidden_states.detach(), q_latent.detach()
        wants_loss = (
            self.indexer is not None
            and self._loss_coefficient > 0
            and self.training
            and torch.is_grad_enabled()
        )
        with torch.set_grad_enabled(wants_loss):
            topk_indices, indexer_inputs = self.topk_source.selection(
                self.indexer, hidden_states, q_latent, layout, wants_inputs=wants_loss
            )
        if self.observer is not None:
            everything = topk_indices is None
            self.observer(
                self.layer_number,
                visible_topk(layout.queries, query.shape[1]) if everything else topk_indices,
            )
        attention = AttentionInputs(
            query,
            latent,
            up_projection,
            topk_indices,
            layout.queries,
            self.dims,
            self.softmax_scale,
        )
        output = sparse_attention(attention)  # [s, b, n * value]
        if wants_loss and indexer_inputs is not None:  # else another iteration's indexer selected
            output = self._attach_loss(output, indexer_inputs, attention, layout.real)
        return output

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    def _attach_loss(
        self,
        output: Tensor,
        indexer_inputs: IndexerInputs,
        attention: AttentionInputs,
        real: Tensor | None,
    ) -> Tensor:
        """Add the indexer's loss to what the output carries.

        Args:
            real: int64, the queries that are not padding, which teaches the indexer nothing; None:
                all of them.
        """
        if real is not None:
            if not len(real):
                return output
            attention = attention.of_queries(real)
            indexer_inputs = indexer_inputs._replace(
                query=indexer_inputs.query[real],  # [real, b, heads, dim]
                weights=indexer_inputs.weights[real],  # [real, b, heads]
            )
        loss = index_loss(
            indexer_inputs,
            attention,
            index_scale=self.indexer.softmax_scale,
            coefficient=self._loss_coefficient,
            sparse=self.config.dsa_indexer_use_sparse_loss,
            per_token=self.config.calculate_per_token_loss,
            tp_group=self.indexer.pg_collection.tp,
        )
        self._log(loss)
        return DSAIndexerLossAutoScaler.apply(output, loss)

    def _log(self, loss: Tensor) -> None:
        """Add to the host's tracker: one slot a decoder layer, then one a depth of MTP.

        The tracker is summed over the pipeline's ranks, so its size follows from the configuration
        alone. A model that came before, or the host's own attention, may have made it smaller.
        """
        decoder_layers = self.config.num_layers
        slots = decoder_layers + (self.config.mtp_num_layers or 0)
        depth = self.topk_source.mtp_depth
        number = self.layer_number if depth is None else decoder_layers + depth
        tracker = DSAIndexerLossLoggingHelper.tracker
        values = tracker.get("values")
        if values is not None and len(values) < slots:
            tracker["values"] = torch.cat([values, values.new_zeros(slots - len(values))])
        DSAIndexerLossLoggingHelper.save_loss_to_tracker(
            loss=loss, layer_number=number, num_layers=slots
        )
