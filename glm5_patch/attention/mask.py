"""The only attention mask that sparse attention computes: causal, within documents if packed."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.query_positions import QueryPositions, query_blocks, visible_keys

_checked: tuple[weakref.ref, int] | None = None
"""The mask that was found right last, and its version: all layers of a forward get the same."""


def require_causal(attention_mask: Tensor | None, queries: QueryPositions) -> None:
    """Refuse a mask that differs from what is computed.

    A causal mask is accepted. It may also hide padding on the right: no real token sees that
    padding, and the output of padding does not matter.

    Reading a mask makes the host wait for the device. So each mask is read once, none is in a
    recompute, whose forward pass has read it, and none while a CUDA graph is captured.

    Args:
        attention_mask: True is hidden, as in Megatron: [1 or b, 1, s, t], or [b, 1, 1, t] of keys.
            [b, t] is Hugging Face's, where True is a real token.
        queries: where the queries stand.

    Raises:
        GLM5PatchError: with what is wrong about the mask and what to do.
    """
    global _checked
    if attention_mask is None or _is_checked(attention_mask):
        return
    # A graph task runs: this is the recompute of a checkpoint, on a detached copy of the mask.
    if torch._C._current_graph_task_id() != -1 or torch.compiler.is_compiling():
        return
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    _check(attention_mask, queries)
    _checked = weakref.ref(attention_mask), attention_mask._version


def _is_checked(mask: Tensor) -> bool:
    return _checked is not None and _checked[0]() is mask and _checked[1] == mask._version


def _check(mask: Tensor, queries: QueryPositions) -> None:
    if mask.is_floating_point():
        raise _refused(mask, "has numbers; it must be bool, True where a key is hidden", "")
    mask = mask.bool()
    if mask.dim() == 2:
        mask = ~mask[:, None, None, :]
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise _refused(
            mask, "must be one of [b, 1, queries, keys], [b, 1, 1, keys] or [b, keys]", ""
        )
    if mask.shape[2] == 1:
        if (mask[..., :-1] & ~mask[..., 1:]).any():
            raise _refused(mask, "hides keys before others that it shows: padding on the left")
        return
    shape = len(queries.starts), queries.keys
    if mask.shape[2:] != shape:
        raise _refused(mask, f"does not fit {shape[0]} queries and {shape[1]} keys", "")
    for block in query_blocks(shape[0], 4 * mask.shape[0] * shape[1]):
        _check_block(mask, mask[:, 0, block], block, queries)


def _check_block(mask: Tensor, hidden: Tensor, block: slice, queries: QueryPositions) -> None:
    """``hidden``: bool [1 or b, block, keys]."""
    keys = torch.arange(hidden.shape[-1], device=hidden.device)
    places = queries.places[block]
    causal = keys <= places[:, None]
    visible = torch.zeros_like(causal)
    seen = visible_keys(block, queries)
    visible[:, : seen.shape[1]] = seen
    # A query that may not see itself is padding.
    is_padding = hidden.gather(-1, places[None, :, None].expand(len(hidden), -1, 1))
    right = [((hidden == ~expected) | is_padding).all() for expected in (causal, visible)]
    if right[0] or right[1]:
        return
    shows_too_much = (~hidden & ~causal & ~is_padding).any()
    if shows_too_much:
        raise _refused(mask, "shows keys after the query")
    raise _refused(mask, "hides keys before the query: padding on the left, or several documents")


_FIX = (
    "; sparse attention is causal and knows no other mask: pad on the right, or pack documents "
    "(packed_seq_params with qkv_format='thd'), or pass attention_mask=None"
)


def _refused(mask: Tensor, cause: str, fix: str = _FIX) -> GLM5PatchError:
    shape = list(mask.shape)
    return GLM5PatchError(f"attention_mask of shape {shape} {cause}{fix or '; None is causal'}")
