"""The sparse core of multi-latent attention, sharing one layer's top-k with the layers after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ..config.fields import LOSS_LAYERS, SERVED, attends_to_every_key
from ..errors import GLM5PatchError
from ..ops.index_loss.operation import index_loss, scale_of
from ..ops.index_loss.reference import LossSettings
from ..ops.index_loss.served import LossAndGradients, loss_in_backward
from ..ops.index_topk.reference import IndexerInputs
from ..ops.query_positions import visible_topk
from ..ops.sparse_attention.inputs import AttentionInputs, MLADims
from ..ops.sparse_attention.operation import sparse_attention
from ..topk.source import TopkSource
from ..topk.tokens import Layout, head_group, token_group
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

    attention_observer: Callable[[AttentionInputs], None] | None = None
    """Called with what each forward attends to, without padding; for metrics."""

    make_query: Callable[[], Tensor] | None = None
    """Of the next forward, see ``AttentionInputs``. Not for its recompute, whose query is kept."""

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
        self.head_group = head_group(config, pg_collection)
        self.serves = getattr(config, LOSS_LAYERS, None) == SERVED and self.topk_source.users > 1
        """Whether the indexer that selects for this layer learns from other layers too."""
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
        trains = self._loss_coefficient > 0 and self.training
        wants_loss = trains and torch.is_grad_enabled() and self.indexer is not None
        serves = trains and self.serves and self.topk_source.carrier().records_gradients
        wants_inputs = wants_loss or (serves and not self._loss_is_sparse)
        with torch.set_grad_enabled(wants_loss):
            topk_indices, indexer_inputs = self.topk_source.selection(
                self.indexer, hidden_states, q_latent, layout, wants_inputs
            )
        if self.observer is not None:
            everything = topk_indices is None
            self.observer(
                self.layer_number,
                visible_topk(layout.queries, query.shape[1]) if everything else topk_indices,
            )
        make_query, self.make_query = self.make_query, None
        attention = AttentionInputs(
            query,
            latent,
            up_projection,
            topk_indices,
            layout.queries,
            self.dims,
            self.softmax_scale,
            make_query=make_query,
        )
        if self.attention_observer is not None:
            self.attention_observer(_of_real(layout, attention.detach(), None)[0])
        output, lse = sparse_attention(attention)  # [s, b, n * value]
        self.topk_source.fetch_next(output)
        attention = attention._replace(lse=lse)
        if serves:
            output = self._attach_served_loss(output, indexer_inputs, attention, layout)
        elif wants_loss and indexer_inputs is not None:  # else another iteration's indexer selected
            output = self._attach_loss(output, indexer_inputs, attention, layout)
        return layout.own_heads(output)

    @property
    def _loss_coefficient(self) -> float:
        return self.config.dsa_indexer_loss_coeff or 0.0

    @property
    def _loss_is_sparse(self) -> bool:
        """Whether the indexer's loss is over the selected keys alone."""
        dense = attends_to_every_key(self.config)
        return self.config.dsa_indexer_use_sparse_loss and not dense

    def _attach_loss(
        self,
        output: Tensor,
        indexer_inputs: IndexerInputs,
        attention: AttentionInputs,
        layout: Layout,
    ) -> Tensor:
        """Add the indexer's loss to what the output carries. Padding teaches the indexer
        nothing."""
        attention, indexer_inputs = _of_real(layout, attention, indexer_inputs)
        if len(attention.query):
            loss = index_loss(
                indexer_inputs,
                attention,
                index_scale=self.indexer.softmax_scale,
                coefficient=self._loss_coefficient,
                sparse=self._loss_is_sparse,
                per_token=self.config.calculate_per_token_loss,
                mean_over=layout.num_real,
                tp_group=self.head_group,
            )
        else:
            loss = _nothing(indexer_inputs)
        self._log_loss(loss, layout, attention.query.shape[1])
        return DSAIndexerLossAutoScaler.apply(output, loss)

    def _attach_served_loss(
        self,
        output: Tensor,
        indexer_inputs: IndexerInputs | None,
        attention: AttentionInputs,
        layout: Layout,
    ) -> Tensor:
        """Add this layer's part to the loss of the indexer that selected. If that is this layer's,
        add the loss to what the output carries: the backward gets it when all parts are there."""
        attention, indexer_inputs = _of_real(layout, attention, indexer_inputs)
        sparse = self._loss_is_sparse
        if not len(attention.query):
            if indexer_inputs is None or not torch.is_grad_enabled():
                return output
            loss = _nothing(indexer_inputs)
            self._log_loss(loss, layout, attention.query.shape[1])
            return DSAIndexerLossAutoScaler.apply(output, loss)
        served, user = self.topk_source.served_loss(sparse)
        settings, b = None, attention.query.shape[1]
        if indexer_inputs is not None:
            per_token = self.config.calculate_per_token_loss
            scale = scale_of(self._loss_coefficient, per_token, layout.num_real, b)
            settings = LossSettings(self.indexer.softmax_scale, scale, sparse)
            served.begin(indexer_inputs, settings)
        if not torch.is_grad_enabled():
            return output
        served.add(user, attention, self.head_group)
        if indexer_inputs is None:
            return output

        def take(inputs: IndexerInputs) -> LossAndGradients:
            found = served.take(inputs, settings)
            self._log_loss(found.loss, layout, b)
            return found

        loss = loss_in_backward(indexer_inputs, take, always=output.requires_grad)
        return DSAIndexerLossAutoScaler.apply(output, loss)

    def _log_loss(self, loss: Tensor, layout: Layout, b: int) -> None:
        log_loss(
            self.config,
            loss,
            self.layer_number,
            self.topk_source.mtp_depth,
            self.token_group,
            self.cp_group,
            layout.num_real * b,
        )


def _of_real(
    layout: Layout, attention: AttentionInputs, indexer_inputs: IndexerInputs | None
) -> tuple[AttentionInputs, IndexerInputs | None]:
    """The queries that are not padding."""
    real = layout.real
    if real is None:
        return attention, indexer_inputs
    if indexer_inputs is not None:
        indexer_inputs = indexer_inputs._replace(
            query=indexer_inputs.query[real],  # [real, b, heads, dim]
            weights=indexer_inputs.weights[real],  # [real, b, heads]
        )
    return attention.of_queries(real), indexer_inputs


def _nothing(indexer_inputs: IndexerInputs) -> Tensor:
    """The loss of no queries: other ranks wait for this one in the backward of the gathered key."""
    return sum(tensor[:0].sum() for tensor in indexer_inputs)
