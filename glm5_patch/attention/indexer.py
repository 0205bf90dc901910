"""The lightning indexer as Hugging Face's ``GlmMoeDsaIndexer`` (transformers >= 5.13) computes it.

Parameters, names and construction are the host's ``DSAIndexer``; what it computes is not. The
released megatron-core 0.16 to 0.18 take the rope slice from the wrong end, rotate by a Hadamard
matrix that GLM-5 does not have, and give ``k_norm`` the wrong epsilon.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    rotate_activation,
)
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ..config.fields import FP8
from ..ops.index_topk.fp8 import fp8_inputs
from ..ops.index_topk.operation import fp8_index_topk, index_topk
from ..ops.index_topk.reference import IndexerInputs, block_scores
from ..ops.query_positions import QueryPositions, visible_keys
from ..ops.rotation.operation import rotate
from ..topk.tokens import Layout, token_group
from .rope import Rope


class LightningIndexer(DSAIndexer):
    """Selects the keys that each query attends to (DeepSeek-V3.2-Exp, section 2.1).

    ``dsa_indexer_rope_interleaved``, ``dsa_indexer_rotate_activation`` and
    ``dsa_indexer_k_norm_epsilon`` mean what they mean in megatron-core 0.19.
    """

    def __init__(self, config, submodules, pg_collection=None) -> None:
        super().__init__(config, submodules, pg_collection)
        if config.dsa_indexer_k_norm_epsilon is not None:
            k_norm_config = copy.copy(config)
            k_norm_config.normalization = "LayerNorm"
            self.k_norm = build_module(
                submodules.k_norm,
                config=k_norm_config,
                hidden_size=self.index_head_dim,
                eps=config.dsa_indexer_k_norm_epsilon,
            )
        self.token_group = token_group(config, self.pg_collection)
        self._mark_parameters()
        self._rope = Rope(
            config,
            self.rotary_pos_emb,
            "indexer",
            interleaved=config.dsa_indexer_rope_interleaved,
        )

    def _mark_parameters(self) -> None:
        """Tell the host how the tensor-parallel ranks' gradients of the indexer make up one: where
        tokens are shared out, each is the part of the rank's own tokens; else all are equal."""
        for parameter in self.parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                # The host looks at the first before the second.
                parameter.average_gradients_across_tp_domain = self.token_group is None
                parameter.sequence_parallel = self.token_group is not None

    def inputs(self, hidden_states: Tensor, q_latent: Tensor, layout: Layout) -> IndexerInputs:
        """Project and rotate.

        Args:
            hidden_states: [s, b, h], or [s / tp, b, h] under sequence parallelism.
            q_latent: normalised, [s, b, q_lora_rank] likewise.
            layout: where the tokens stand.

        Returns:
            Queries and weights of this rank's tokens, and the keys of the whole sequence.
        """
        if torch.is_grad_enabled():
            self._mark_parameters()  # adapters come after the module is built
        tp_group = self.pg_collection.tp
        if self.token_group is None and self.config.sequence_parallel and tp_group.size() > 1:
            # [s / tp, b, h] -> [s, b, h]
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
            # [s / tp, b, q_lora_rank] -> [s, b, q_lora_rank]
            q_latent = gather_from_sequence_parallel_region(q_latent, group=tp_group)
        # From here on s is this rank's tokens: s / tp where tokens are shared out.
        rotation = self._rope.rotation(layout, q_latent.dtype)
        key = self.k_norm(self.linear_wk(hidden_states)[0])  # [s, b, dim]
        # A head is [rope | nope].
        key = rotate(key[:, :, None, None], rotation, first=0)  # [s, b, 1, dim]
        if self.config.dsa_indexer_rotate_activation:
            key = rotate_activation(key)
        gathering = layout.gather(key.squeeze(2))
        query = self.linear_wq_b(q_latent)[0]  # [s, b, heads * dim]
        query = query.unflatten(-1, (1, self.index_n_heads, self.index_head_dim))
        query = rotate(query, rotation, first=0)  # [s, b, heads, dim]
        if self.config.dsa_indexer_rotate_activation:
            query = rotate_activation(query)
        weights = self.linear_weights_proj(hidden_states)[0].float()  # [s, b, heads]
        weights = weights * self.index_n_heads**-0.5
        key = gathering.wait()  # [t, b, dim]
        return IndexerInputs(query, key, weights)

    def select(self, inputs: IndexerInputs, queries: QueryPositions) -> Tensor:
        """The ``index_topk`` best visible keys of each query, int32 [b, s, k], as of
        ``ops.index_topk``."""
        k = min(self.index_topk, queries.keys)
        if self.config.dsa_indexer_precision == FP8:
            return fp8_index_topk(inputs, queries, k, self.softmax_scale, self._rotates_for_fp8)
        return index_topk(inputs, queries, k, self.softmax_scale)

    def scoring(self, inputs: IndexerInputs) -> tuple[IndexerInputs, float]:
        """What the scores are made of in the precision in which this layer selects, and the scale
        of the products of queries and keys."""
        if self.config.dsa_indexer_precision != FP8:
            return inputs, self.softmax_scale
        with torch.no_grad():
            return fp8_inputs(inputs, self.softmax_scale, self._rotates_for_fp8), 1.0

    @property
    def _rotates_for_fp8(self) -> bool:
        """Whether the rounding applies the Hadamard matrix, because nothing has yet."""
        return not self.config.dsa_indexer_rotate_activation

    def forward(self, x, qr, mask=None, packed_seq_params=None) -> Tensor:
        """The host's slots: top-k of each query, see ``select``. The mask is causal, and only that.

        Args:
            x: the hidden states.
            qr: the normalised query latent.
            mask: ignored.
            packed_seq_params: documents of a pack.
        """
        return self.forward_with_scores(x, qr, mask, packed_seq_params)[1]

    def forward_with_scores(self, x, qr, mask=None, packed_seq_params=None):
        """The host's slots, see ``forward``: scores [b, s, t] (-inf where invisible) and top-k of
        this rank's queries. For looking: the scores alone take memory quadratic in s, and the
        attention never asks for them."""
        return self._scores_and_topk(x, qr, packed_seq_params)

    def _scores_and_topk(self, hidden_states: Tensor, q_latent: Tensor, packed_seq_params):
        tp_size = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        layout = Layout.of(
            self.config,
            self.pg_collection.cp,
            packed_seq_params,
            len(hidden_states) * tp_size,
            hidden_states.device,
            self.token_group,
        )
        inputs = self.inputs(hidden_states, q_latent, layout)
        queries, whole = layout.queries, slice(0, len(layout.queries.starts))
        scores = block_scores(inputs, whole, queries.end(whole), self.softmax_scale)  # [b, s, t]
        scores = scores.masked_fill(~visible_keys(whole, queries), float("-inf"))
        return scores, self.select(inputs, queries)
