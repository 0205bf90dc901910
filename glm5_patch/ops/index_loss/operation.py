"""The loss that trains the indexer: KL(attention || indexer), as megatron-core 0.19 defines it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from ..fallback import compute
from ..index_topk.reference import IndexerInputs
from ..sparse_attention.inputs import AttentionInputs
from .reference import LossSettings


def index_loss(
    inputs: IndexerInputs,
    attention: AttentionInputs,
    *,
    index_scale: float,
    coefficient: float,
    sparse: bool,
    per_token: bool,
    mean_over: float | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Scaled KL divergence of the indexer's distribution from the attention's, a scalar.

    The target is the attention probability summed over all heads of all tensor-parallel ranks and
    normalised; no gradient flows into it. DeepSeek-V3.2-Exp, section 2.1.

    Args:
        inputs: the indexer's projections, with the graph of the parameters that the loss trains.
        attention: what the attention is computed from.
        index_scale: of the products of the indexer's queries and keys.
        coefficient: ``dsa_indexer_loss_coeff``.
        sparse: both distributions over the selected keys only, not over all visible ones.
        per_token: the sum over the queries instead of their mean (``calculate_per_token_loss``).
        mean_over: how many queries of a sequence the mean is of; None: s. Where ranks share the
            queries out it is more, and each one's loss is its part of the mean.
        tp_group: of the ranks that share the attention's heads out; None: one rank has all.
    """
    s, b = attention.query.shape[:2]
    loss_scale = scale_of(coefficient, per_token, s if mean_over is None else mean_over, b)
    settings = LossSettings(index_scale, loss_scale, sparse, tp_group)
    return loss_under(inputs, attention.detach(), settings)


def loss_under(inputs: IndexerInputs, attention: AttentionInputs, settings: LossSettings) -> Tensor:
    """As ``index_loss``, of an attention that is detached, by the backend that fits both."""
    widths = dict(attention.call.widths) | dict(inputs.call.widths)
    call = attention.call._replace(widths=tuple(widths.items()))
    return compute("index_loss", call, inputs, attention, settings)


def scale_of(coefficient: float, per_token: bool, mean_over: float, b: int) -> float:
    """The factor of the sum over the queries of b sequences; see ``index_loss``."""
    return coefficient if per_token else coefficient / (mean_over * b)
