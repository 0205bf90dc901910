"""Which tokens of a pack are padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.query_positions import QueryPositions, is_thd


def real_queries(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    """Which queries of a pack are not padding, bool [s], or None where nothing tells of padding.

    ``real_token_mask_q`` (bool [s], megatron-core 0.19's name) says which they are. Without it the
    lengths in ``cu_seqlens_q`` do, where ``cu_seqlens_q_padded`` says how documents are padded.

    Raises:
        GLM5PatchError: ``real_token_mask_q`` fits neither this rank's tokens nor the whole pack.
    """
    if not is_thd(packed_seq_params):
        return None
    mask = getattr(packed_seq_params, "real_token_mask_q", None)
    if mask is None:
        return _real_by_lengths(packed_seq_params, queries)
    mask = mask.flatten().bool().to(queries.starts.device)
    if len(mask) == queries.keys:
        return mask[queries.places]
    if len(mask) != len(queries.starts):
        raise GLM5PatchError(
            f"real_token_mask_q has {len(mask)} entries for {len(queries.starts)} tokens on "
            f"this rank, {queries.keys} in the pack; give it one entry for each token"
        )
    return mask


def real_lengths(packed_seq_params) -> tuple[int, ...] | None:
    """Tokens of each document of a pack without padding; None where no lengths tell them."""
    if packed_seq_params.cu_seqlens_q_padded is None:
        return None
    return tuple(packed_seq_params.cu_seqlens_q.diff().tolist())


def _real_by_lengths(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    padded = packed_seq_params.cu_seqlens_q_padded
    if padded is None:
        return None
    device = queries.starts.device
    lengths = packed_seq_params.cu_seqlens_q.diff().to(device)
    document = torch.searchsorted(padded.long().to(device), queries.places, right=True) - 1
    return queries.local_positions < lengths[document]
