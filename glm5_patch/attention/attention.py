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

from ..config.schedule import IndexSchedule
from ..errors import GLM5PatchError
from ..ops.index_loss.operation import index_loss
from ..ops.index_topk.reference import IndexerInputs
from ..ops.query_positions import visible_topk
from ..ops.sparse_attention.inputs import AttentionInputs, MLADims
from ..ops.sparse_attention.operation import sparse_attention
from ..topk.carrier import current_carrier, require_carrier
from ..topk.mtp import mtp_depth
from ..topk.tokens import Layout
from .mask import require_causal


class CrossLayerDSAttention(MegatronModule):
    """Core attention of one layer: computes a top-k and publishes it, or reuses its source's.

    A skip layer has no indexer, hence no indexer parameters. Takes the place of the host's
    ``DSAttention``, with its constructor; its keys and values are still the latent, as
    ``CrossLayerMLASelfAttention`` hands it over.
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
    ) -> None:
        """Raises GLM5PatchError for a setting that would be computed wrongly."""
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise GLM5PatchError(f"attn_mask_type={attn_mask_type}: only a causal mask is possible")
        self.layer_number = layer_number
        self.schedule = IndexSchedule.from_megatron(config)
        self.mtp_depth = mtp_depth(layer_number, self.schedule.num_layers)
        self.source = layer_number if self.is_mtp else self.schedule.source(layer_number)
        self.softmax_scale = (k_channels or config.kv_channels) ** -0.5
        if softmax_scale is not None:
            self.softmax_scale = softmax_scale
        self.dims = MLADims.of(config)
        self.cp_group = None if pg_collection is None else pg_collection.cp
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
            query: [s, b, n, qk_head_dim + rope]; heads of this tensor-parallel rank.
            key: the latent [t, b, 1, kv_lora_rank + rope]; under context parallelism of the whole
                sequence.
            value: what makes keys and values of the latent,
                [kv_lora_rank, n * (qk_head_dim + v_head_dim)].
            attention_mask: checked, see ``require_causal``: the mask is causal, within documents if
                packed.
            x: hidden states [s, b, h] ([s / tp, b, h] under sequence parallelism).
            qr: normalised query latent [s, b, q_lora_rank] likewise.
            packed_seq_params: documents of a pack.

        Returns:
            [s, b, n * v_head_dim].

        Raises:
            MissingTopkError: a skip layer found no top-k of its source.
            GLM5PatchError: query and key differ in length (a KV cache), or the mask is another.
        """
        layout = Layout.of(self.config, self.cp_group, packed_seq_params, len(query), query.device)
        if layout.queries.keys != len(key):
            raise GLM5PatchError(
                f"layer {self.layer_number}: {len(query)} queries for {len(key)} keys; "
                "decoding with a KV cache is not supported, run whole sequences"
            )
        require_causal(attention_mask, layout.queries)
        # No gradient flows from the indexer into the model.
        x, qr = x.detach(), qr.detach()
        wants_loss = (
            self.indexer is not None
            and self._loss_coefficient > 0
            and self.training
            and torch.is_grad_enabled()
        )
        with torch.set_grad_enabled(wants_loss):
            topk_indices, inputs = self._topk(x, qr, layout, wants_loss)
        if self.observer is not None:
            everything = topk_indices is None
            self.observer(
                self.layer_number,
                visible_topk(layout.queries, query.shape[1]) if everything else topk_indices,
            )
        attention = AttentionInputs(
            query, key, value, topk_indices, layout.queries, self.dims, self.softmax_scale
        )
        output = sparse_attention(attention)
        if wants_loss:
            output = self._attach_loss(output, inputs, attention, layout.real)
        return output

    @property
    def is_mtp(self) -> bool:
        """Whether the layer belongs to multi-token prediction."""
        return self.mtp_depth is not None

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    def _topk(self, x, qr, layout: Layout, wants_inputs: bool):
        """The top-k of this layer (None: every visible key), and the indexer's inputs if wanted.

        A skip layer reads its source's. A computing layer publishes its own, and in a recompute
        takes the one found in the forward pass, so that both passes attend to the same keys and
        no second selection is paid for. Where every key fits, nobody selects.
        """
        everything = layout.queries.all_fit(self.config.dsa_indexer_topk)
        if self.indexer is None:
            carrier = require_carrier(self.layer_number, self.source)
            topk_indices = None if everything else carrier.read(self.layer_number, self.source)
            return topk_indices, None
        carrier = None if self.is_mtp else current_carrier()
        topk_indices = None if carrier is None else carrier.published(self.layer_number)
        selects = topk_indices is None and not everything
        inputs = self.indexer.inputs(x, qr, layout) if selects or wants_inputs else None
        if selects:
            topk_indices = self.indexer.select(inputs, layout.queries)
            if carrier is not None:
                carrier.publish(self.layer_number, topk_indices, self.schedule)
        return topk_indices, inputs

    def _attach_loss(
        self, output: Tensor, inputs: IndexerInputs, attention: AttentionInputs, real: Tensor | None
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
            inputs = inputs._replace(query=inputs.query[real], weights=inputs.weights[real])
        loss = index_loss(
            inputs,
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
        number = decoder_layers + self.mtp_depth if self.is_mtp else self.layer_number
        tracker = DSAIndexerLossLoggingHelper.tracker
        values = tracker.get("values")
        if values is not None and len(values) < slots:
            tracker["values"] = torch.cat([values, values.new_zeros(slots - len(values))])
        DSAIndexerLossLoggingHelper.save_loss_to_tracker(
            loss=loss, layer_number=number, num_layers=slots
        )
