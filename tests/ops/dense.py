"""What the operations compute, with everything in memory at once: loops for who sees whom, and
plain torch for the rest. Nothing of the package is called here."""

from __future__ import annotations

import torch


def starts_of(lengths: list[int]) -> torch.Tensor:
    """The position where each token's document starts, int64 [s]."""
    starts, begin = [], 0
    for length in lengths:
        starts += [begin] * length
        begin += length
    return torch.tensor(starts, dtype=torch.int64)


def visible(lengths: list[int]) -> torch.Tensor:
    """Causal within documents, bool [s, s]."""
    starts = starts_of(lengths).tolist()
    mask = torch.zeros(len(starts), len(starts), dtype=torch.bool)
    for row, start in enumerate(starts):
        mask[row, start : row + 1] = True
    return mask


def selected(topk_indices: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The keys that a top-k [b, s, k] names, counted from the document's start; bool [b, s, s]."""
    starts = starts_of(lengths).tolist()
    b, s, _ = topk_indices.shape
    mask = torch.zeros(b, s, s, dtype=torch.bool)
    for batch in range(b):
        for row, start in enumerate(starts):
            for key in topk_indices[batch, row].tolist():
                if key >= 0:
                    mask[batch, row, start + key] = True
    return mask


def best(scores: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of what each query sees; of equals the first. Both [b, s, s], bool out."""
    order = scores.masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True, stable=True)[1]
    return torch.zeros_like(mask).scatter(-1, order[..., :k], True) & mask


def keys_and_values(latent, up, nope: int, value: int):
    """[t, b, 1, latent + rope], [latent, n * (nope + value)] -> [t, b, n, nope + rope] and
    [t, b, n, value]."""
    width = len(up)
    heads = up.shape[1] // (nope + value)
    made = (latent[..., 0, :width] @ up).unflatten(-1, (heads, nope + value))
    rope = latent[..., width:].expand(-1, -1, heads, -1)
    return torch.cat([made[..., :nope], rope], -1), made[..., nope:]


def probabilities(query, key, mask, scale: float) -> torch.Tensor:
    """[s, b, n, d], [t, b, n, d] and bool [b, s, t] -> [b, n, s, t]; zeros for a query without
    keys."""
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    mask = mask[:, None]
    return logits.masked_fill(~mask, -1e30).softmax(-1) * mask


def attention(query, key, value, mask, scale: float) -> torch.Tensor:
    """[s, b, n * value]."""
    probs = probabilities(query, key, mask, scale)
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


def index_scores(query, key, weights, scale: float) -> torch.Tensor:
    """[s, b, heads, dim], [t, b, dim] and [s, b, heads] -> [b, s, t]."""
    per_head = torch.einsum("sbhd,tbd->bsht", query, key).mul(scale).relu()
    return torch.einsum("bsht,sbh->bst", per_head, weights)


def index_loss(scores, probs, mask) -> torch.Tensor:
    """KL(attention || indexer), mean over the queries (megatron-core 0.19's definition).

    Args:
        scores: of the indexer, [b, s, t].
        probs: of each head of the attention, [b, n, s, t].
        mask: where both distributions are, [b, s, t].
    """
    predicted = scores.masked_fill(~mask, float("-inf")).log_softmax(-1)
    target = probs.mean(1)
    terms = target * (target.clamp_min(1e-10).log() - predicted.masked_fill(~mask, 0.0))
    return terms.masked_fill(~mask, 0.0).sum(-1).mean()
