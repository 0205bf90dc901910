"""The lightning indexer as Hugging Face's ``GlmMoeDsaIndexer`` (transformers >= 5.13) computes it.

Parameters, names and construction are the host's ``DSAIndexer``; what it computes is not. The
released megatron-core 0.16 to 0.18 take the rope slice from the wrong end, rotate by a Hadamard
matrix that GLM-5 does not have, and give ``k_norm`` the wrong epsilon.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    rotate_activation,
)
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ..ops.registry import use_triton
from ..ops.rows import Rows, query_blocks, visible_keys
from ..topk.tokens import Layout
from .rope import Rope


class IndexerInputs(NamedTuple):
    """What the scores are made of; positions are already rotated in."""

    query: Tensor
    """[s, b, index_n_heads, index_head_dim]."""
    key: Tensor
    """[t, b, index_head_dim]; t is s, or under context parallelism the whole sequence."""
    weights: Tensor
    """fp32 [s, b, index_n_heads], scaled by ``index_n_heads ** -0.5``."""


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
        for parameter in self.parameters():
            # The same on every tensor-parallel rank, from the same gathered inputs.
            parameter.average_gradients_across_tp_domain = True
        self._rope = Rope(
            config,
            self.rotary_pos_emb,
            self.pg_collection.cp,
            interleaved=config.dsa_indexer_rope_interleaved,
        )

    def inputs(self, x: Tensor, qr: Tensor, layout: Layout) -> IndexerInputs:
        """Project and rotate.

        Args:
            x: hidden states [s, b, h], or [s / tp, b, h] under sequence parallelism.
            qr: the normalised query latent, [s, b, q_lora_rank] likewise.
            layout: where the tokens stand.
        """
        if self.config.sequence_parallel and self.pg_collection.tp.size() > 1:
            x = gather_from_sequence_parallel_region(x, group=self.pg_collection.tp)
            qr = gather_from_sequence_parallel_region(qr, group=self.pg_collection.tp)
        s, b, _ = x.shape
        # [s, b, heads * dim] -> [s, b, heads, dim]
        q = self.linear_wq_b(qr)[0].view(s, b, self.index_n_heads, self.index_head_dim)
        # [s, b, dim] -> [s, b, 1, dim]
        k = self.k_norm(self.linear_wk(x)[0]).unsqueeze(2)
        angles = self._rope.frequencies(layout.rows)
        q, k = self._rotate_positions(q, *angles), self._rotate_positions(k, *angles)
        if self.config.dsa_indexer_rotate_activation:
            q, k = rotate_activation(q), rotate_activation(k)
        weights = self.linear_weights_proj(x)[0].float() * self.index_n_heads**-0.5
        return IndexerInputs(q, layout.gather(k.squeeze(2)), weights)

    def block_scores(self, inputs: IndexerInputs, block: slice, end: int) -> Tensor:
        """Index scores of a block of queries against the first keys, fp32 [b, block, end].

        Unmasked, and in Hugging Face's order of operations, so that near ties fall alike.
        """
        q = inputs.query[block].transpose(0, 1).float()  # [b, rows, heads, dim]
        k = inputs.key[:end].permute(1, 2, 0).float()  # [b, dim, end]
        weights = inputs.weights[block].transpose(0, 1)  # [b, rows, heads]
        # [b, rows * heads, end] -> [b, rows, heads, end]
        per_head = torch.matmul(q.flatten(1, 2), k).unflatten(1, q.shape[1:3])
        per_head = per_head.mul_(self.softmax_scale).relu_()
        return torch.matmul(weights.unsqueeze(-2), per_head).squeeze(-2)

    def blocks(self, inputs: IndexerInputs):
        """Slices over the queries that bound the [b, rows, heads, s] logits of a block."""
        s, b, heads, _ = inputs.query.shape
        return query_blocks(s, b * heads * len(inputs.key) * 4)

    @torch.no_grad()
    def select(self, inputs: IndexerInputs, rows: Rows) -> Tensor:
        """The ``index_topk`` best visible keys of each query.

        Equal scores fall as ``torch.topk`` lets them, as in Hugging Face; under
        ``torch.use_deterministic_algorithms``, and by Triton, the lower position wins.

        Returns:
            int32 [b, s, min(index_topk, t)]: positions counted from the query's document start;
            -1 where fewer keys are visible.
        """
        s, b = inputs.query.shape[:2]
        k = min(self.index_topk, rows.keys)
        widths = dict(
            dsa_indexer_n_heads=self.index_n_heads, dsa_indexer_head_dim=self.index_head_dim
        )
        if use_triton(inputs.query, **widths):
            from ..ops.index_topk.triton import select

            return select(*inputs, rows, k, self.softmax_scale)
        topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=inputs.query.device)
        for block in self.blocks(inputs):
            # Full rows: the choice among equal scores depends on the length of the row.
            size, end = block.stop - block.start, rows.end(block)
            scores = torch.full((b, size, rows.keys), float("-inf"), device=inputs.query.device)
            scores[..., :end] = self.block_scores(inputs, block, end).masked_fill_(
                ~visible_keys(block, rows), float("-inf")
            )
            if torch.are_deterministic_algorithms_enabled():
                values, columns = scores.sort(dim=-1, descending=True, stable=True)
                values, columns = values[..., :k], columns[..., :k]
            else:
                values, columns = scores.topk(k, dim=-1)
            local = columns - rows.starts[block, None]
            topk_indices[:, block] = local.masked_fill(values == float("-inf"), -1).int()
        return topk_indices

    def forward(self, x, qr, mask=None, packed_seq_params=None) -> Tensor:
        """Top-k of each query; see ``select``. The mask is causal, and only that."""
        return self.forward_with_scores(x, qr, mask, packed_seq_params)[1]

    def forward_with_scores(self, x, qr, mask=None, packed_seq_params=None):
        """Scores [b, s, s] (-inf where invisible) and top-k. For looking: the scores alone take
        memory quadratic in s, and the attention never asks for them."""
        tp_size = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        s = len(x) * tp_size
        layout = Layout.of(self.config, self.pg_collection.cp, packed_seq_params, s, x.device)
        inputs, rows, whole = self.inputs(x, qr, layout), layout.rows, slice(0, s)
        scores = self.block_scores(inputs, whole, rows.end(whole))
        scores = scores.masked_fill(~visible_keys(whole, rows), float("-inf"))
        return scores, self.select(inputs, rows)

    def _rotate_positions(self, t: Tensor, angles: Tensor, mscale: float) -> Tensor:
        """Rotate the leading ``qk_pos_emb_head_dim`` of [s, b, heads, dim]: [rope | nope]."""
        rope_dim = self.qk_pos_emb_head_dim
        rope, nope = t.split([rope_dim, self.index_head_dim - rope_dim], dim=-1)
        return torch.cat([self._rope.rotate(rope, angles, mscale), nope], dim=-1)
