"""The sparse core of multi-latent attention, sharing one layer's top-k with the layers after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
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
from ..topk.tokens import Layout, token_group
from .loss_log import log_loss
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
    """Called with the layer number and the top-k that each forward attends to, of this rank's
    queries; for metrics."""

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
        self.token_group = token_group(config, pg_collection)
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
            query,  # [s, b, n, nope + rope]; where tokens are shared out, [s / tp, b, tp * n, ...]
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

        In the shapes s and n are this rank's: all tokens and its heads, or its tokens and all heads
        where tokens are shared out.

        Args:
            query: [s, b, n, nope + rope].
            latent: [t, b, 1, latent + rope]; under context parallelism of the whole sequence.
            up_projection: makes keys and values of the latent, [latent, n * (nope + value)].
            hidden_states: [s, b, h] ([s / tp, b, h] under sequence parallelism).
            q_latent: normalised, [s, b, q_lora_rank] likewise.
            attention_mask: checked, see ``require_causal``: the mask is causal, within documents if
                packed.
            packed_seq_params: documents of a pack.

        Returns:
            [s, b, n * value] of all tokens and this rank's heads.

        Raises:
            MissingTopkError: a skip layer found no top-k of its source.
            GLM5PatchError: query and latent differ in length (a KV cache), or the mask is another.
        """
        sharers = 1 if self.token_group is None else self.token_group.size()
        layout = Layout.of(
            self.config,
            self.cp_group,
            packed_seq_params,
            len(query) * sharers,
            query.device,
            self.token_group,
        )
        if layout.queries.keys != len(latent):
            raise GLM5PatchError(
                f"layer {self.layer_number}: {len(query)} queries for {len(latent)} keys; "
                "decoding with a KV cache is not supported, run whole sequences"
            )
        require_causal(attention_mask, layout.everyone)
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
            output = self._attach_loss(output, indexer_inputs, attention, layout)
        return layout.own_heads(output)

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    def _attach_loss(
        self,
        output: Tensor,
        indexer_inputs: IndexerInputs,
        attention: AttentionInputs,
        layout: Layout,
    ) -> Tensor:
        """Add the indexer's loss to what the output carries. Padding teaches the indexer
        nothing."""
        real = layout.real
        if real is not None:
            attention = attention.of_queries(real)
            indexer_inputs = indexer_inputs._replace(
                query=indexer_inputs.query[real],  # [real, b, heads, dim]
                weights=indexer_inputs.weights[real],  # [real, b, heads]
            )
        if len(attention.query):
            heads_are_shared_out = self.token_group is None
            loss = index_loss(
                indexer_inputs,
                attention,
                index_scale=self.indexer.softmax_scale,
                coefficient=self._loss_coefficient,
                sparse=self.config.dsa_indexer_use_sparse_loss,
                per_token=self.config.calculate_per_token_loss,
                mean_over=layout.num_real,
                tp_group=self.indexer.pg_collection.tp if heads_are_shared_out else None,
            )
        else:
            # Other ranks wait for this one in the backward of the gathered key.
            loss = sum(tensor[:0].sum() for tensor in indexer_inputs)
        log_loss(
            self.config,
            loss,
            self.layer_number,
            self.topk_source.mtp_depth,
            self.token_group,
            self.cp_group,
        )
        return DSAIndexerLossAutoScaler.apply(output, loss)
