"""The kernels of this plugin behind megatron-core 0.19's hooks for fused DSA kernels.

Each function has the name and the arguments of a hook of ``dsa_kernels`` and returns None where it
declines; the host then runs its own torch code. Keys are counted from the start of the sequence
there, not of the document, and a query sees those of [start, end).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from ..ops.fallback import compute
from ..ops.index_loss.reference import LossSettings
from ..ops.index_topk.reference import IndexerInputs
from ..ops.needs import Call
from ..ops.query_positions import QueryPositions, visible_topk
from ..ops.registry import choose
from ..ops.sparse_attention.inputs import AbsorbedInputs


def serves(config) -> bool:
    """Whether these hooks take part: of a model that asks for no other kernels.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS=triton``, and Triton can't.
    """
    if config.dsa_kernel_backend != "none" or config.attention_backend == AttnBackend.unfused:
        return False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = {
        "sparse_attention": ("kv_lora_rank", "qk_pos_emb_head_dim"),
        "index_topk": ("dsa_indexer_n_heads", "dsa_indexer_head_dim"),
    }
    return all(
        _fused(
            operation,
            Call(
                device, config.params_dtype, tuple((name, getattr(config, name)) for name in names)
            ),
        )
        for operation, names in widths.items()
    )


def _fused(operation: str, call: Call) -> bool:
    """Whether kernels compute an operation, and not torch."""
    return choose(operation, call).name != "torch"


def run_fused_qk_topk(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    index_topk: int,
    starts: Tensor,
    ends: Tensor,
    use_relu: bool = True,
    use_local_indexer_varlen: bool = False,
    **_,
) -> tuple[Tensor, Tensor] | None:
    """Top-k of each query, and how many keys each has.

    Args:
        q: [s, b, heads, dim], positions rotated in.
        k: [t, b, dim].
        weights: [s, b, heads], with every scale.
        index_topk: keys to select.
        starts, ends: int32 [s].
        use_relu: what GLM-5's scores have.
        use_local_indexer_varlen: the host cuts the keys of packs under context parallelism up.

    Returns:
        int32 [b, s, min(index_topk, t)], ascending, then -1; and int32 [b, s].
    """
    if not use_relu or use_local_indexer_varlen or not _fused("index_topk", Call.of(q)):
        return None
    inputs = IndexerInputs(q.detach(), k.detach(), weights.detach().float())
    queries = _queries(starts, ends, len(k))
    local = _select(inputs, queries, index_topk)
    return _from_the_start(local, queries), _lengths(local, queries)


def run_fused_qk_topk_with_loss(
    config,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    index_topk: int,
    starts: Tensor,
    ends: Tensor,
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    loss_coeff: float,
    pg_collection,
    query_valid_rows: Tensor | None = None,
    calculate_per_token_loss: bool = False,
    use_relu: bool = True,
    use_local_indexer_varlen: bool = False,
    **_,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As ``run_fused_qk_topk``, and the indexer's loss over the selected keys, a scalar.

    Args:
        query: absorbed, [s, b, n, latent + rope]; no gradient flows into it.
        key: the latent, [t, b, 1, latent + rope]; likewise.
        softmax_scale, loss_coeff: of the attention and of the loss.
        query_valid_rows: bool [b, s]: the rows that count; of a batch of several, declined.
        calculate_per_token_loss: sum the rows up instead of averaging them.
    """
    counts_by_sequence = query_valid_rows is not None and len(query_valid_rows) > 1
    declined = not use_relu or use_local_indexer_varlen or counts_by_sequence
    if declined or key.shape[2] != 1 or not _fused("index_topk", Call.of(q)):
        return None
    loss_call = Call.of(query, heads=query.shape[2], dsa_indexer_n_heads=q.shape[2])
    if not _fused("index_loss", loss_call):
        return None
    from ..ops.index_loss.triton import selected_loss

    inputs = IndexerInputs(q, k, weights.float())
    queries = _queries(starts, ends, len(k))
    local = _select(IndexerInputs(*(tensor.detach() for tensor in inputs)), queries, index_topk)
    topk_indices, lengths = _from_the_start(local, queries), _lengths(local, queries)
    if query_valid_rows is not None:
        real = query_valid_rows[0].nonzero().squeeze(1)
        queries, query, local = queries.of_queries(real), query[real], local[:, real]
        inputs = inputs._replace(query=inputs.query[real], weights=inputs.weights[real])
    absorbed = AbsorbedInputs(
        query.contiguous(),
        key.squeeze(2).contiguous(),
        local.contiguous(),
        *queries.spans(),
        config.kv_lora_rank,
        softmax_scale,
    )
    s, b = query.shape[:2]
    loss_scale = loss_coeff if calculate_per_token_loss else loss_coeff / max(1, s * b)
    settings = LossSettings(1.0, loss_scale, sparse=True, tp_group=pg_collection.tp)
    return topk_indices, lengths, selected_loss(inputs, absorbed, settings)


def run_fused_absorbed_sparse_attention(
    query: Tensor,
    key: Tensor,
    topk_indices: Tensor,
    softmax_scale: float,
    v_channels: int,
    topk_length: Tensor | None = None,
) -> Tensor | None:
    """Attention over the selected keys, [s, b, n, v_channels].

    Args:
        query: absorbed, [s, b, n, latent + rope].
        key: the latent, [t, b, 1, latent + rope].
        topk_indices: int32 [b, s, k].
        softmax_scale: factor of the logits.
        v_channels: how much of a key is its value.
        topk_length: int32 [b, s], how many keys each query has, the same in every sequence of the
            batch; None of a selection by the host's own code, whose order these kernels don't know.
    """
    if topk_length is None or not _fused("sparse_attention", Call.of(query)):
        return None
    from ..ops.sparse_attention.absorption import latent_attention

    return latent_attention(
        AbsorbedInputs(
            query.contiguous(),
            key.squeeze(2).contiguous(),
            topk_indices.contiguous(),
            torch.zeros_like(topk_length[0]),
            topk_length[0] - 1,
            v_channels,
            softmax_scale,
        )
    )


def _queries(starts: Tensor, ends: Tensor, num_keys: int) -> QueryPositions:
    return QueryPositions(starts.long(), ends.long() - 1, num_keys)


def _select(inputs: IndexerInputs, queries: QueryPositions, index_topk: int) -> Tensor:
    """int32 [b, s, k], counted from the document's start; every visible key where that is all."""
    if queries.keys <= index_topk:
        return visible_topk(queries, inputs.query.shape[1]).contiguous()
    return compute("index_topk", inputs.call, inputs, queries, index_topk, 1.0)


def _from_the_start(local: Tensor, queries: QueryPositions) -> Tensor:
    return torch.where(local < 0, -1, local + queries.starts[:, None].int())


def _lengths(topk_indices: Tensor, queries: QueryPositions) -> Tensor:
    b, _, k = topk_indices.shape
    return (queries.local_positions + 1).clamp(0, k).int().expand(b, -1)
