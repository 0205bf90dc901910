"""The indexer's loss for every layer that uses its top-k: the mean of the layers' own losses.

Each layer adds its part when it runs with gradients recorded, in the forward or in its recompute.
The backward of the layer that selected gives the sum to the indexer. Autograd gets there last,
whatever is recomputed, because that layer's output is what the others are computed from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ...errors import GLM5PatchError
from ..fallback import compute
from ..index_topk.reference import IndexerInputs
from ..sparse_attention.inputs import AttentionInputs
from .operation import loss_under
from .reference import LossSettings, SelectedKeys

ROWS = 1024
"""Queries whose target is read at once for its part of the loss."""


INSTEAD = "set dsa_indexer_loss_layers='source' (now 'served')"


class LossAndGradients(NamedTuple):
    """Of the indexer's projections."""

    loss: Tensor
    """fp32 []."""
    gradients: tuple[Tensor, Tensor, Tensor]
    """Of the fields of ``IndexerInputs``, in their order."""


class ServedLoss(ABC):
    """What the layers that use one top-k have added in one forward."""

    def __init__(self, users: int) -> None:
        """Begin with nothing.

        Args:
            users: how many layers use the top-k.
        """
        self.users = users
        self._added: set[Hashable] = set()
        self._taken = False

    @abstractmethod
    def begin(self, inputs: IndexerInputs, settings: LossSettings) -> None:
        """Keep what the parts of the other layers need. The first pass of the layer that selects
        calls this.

        Args:
            inputs: the indexer's projections.
            settings: of the loss.
        """

    def add(
        self, user: Hashable, attention: AttentionInputs, tp_group: ProcessGroup | None
    ) -> None:
        """Add the part of one layer; a second time, as of a recompute, nothing happens.

        Args:
            user: which of the layers.
            attention: what its attention is computed from.
            tp_group: of the ranks that share its heads out; None: one rank has all.
        """
        if user not in self._added:
            self._added.add(user)
            self._add(attention.detach(), tp_group)

    def take(self, inputs: IndexerInputs, settings: LossSettings) -> LossAndGradients:
        """The mean over the layers of their ``index_loss``. What was added is freed.

        Raises:
            GLM5PatchError: a layer has added nothing, or it was taken already.
        """
        if len(self._added) < self.users or self._taken:
            raise GLM5PatchError(
                f"{len(self._added)} of the {self.users} layers that use a top-k ran before the "
                "backward of the layer that selected it, or that went backward twice; run all of "
                f"them with gradients and each backward once, or {INSTEAD}"
            )
        self._taken = True
        return self._take(inputs, settings)

    @abstractmethod
    def _add(self, attention: AttentionInputs, tp_group: ProcessGroup | None) -> None: ...

    @abstractmethod
    def _take(self, inputs: IndexerInputs, settings: LossSettings) -> LossAndGradients: ...


class OverSelectedKeys(ServedLoss):
    """Keeps one target as large as the top-k. The gradient of KL(attention || indexer) by the index
    scores is linear in the attention, so the mean of the losses has the gradient of the loss whose
    target is the mean attention."""

    _probabilities: Tensor | None = None  # fp32 [b, s, k]
    _keys: SelectedKeys | None = None
    _terms: Tensor | None = None  # fp64 []

    def begin(self, inputs: IndexerInputs, settings: LossSettings) -> None:
        """The parts need nothing of it."""

    @torch.no_grad()
    def _add(self, attention: AttentionInputs, tp_group: ProcessGroup | None) -> None:
        attention = attention.with_topk()
        probabilities = compute("index_loss.target", attention.call, attention, tp_group)
        probabilities /= self.users
        terms = _entropy_terms(probabilities, self.users)
        if self._probabilities is None:
            self._keys = SelectedKeys(attention.topk_indices, attention.queries)
            self._probabilities, self._terms = probabilities, terms
        else:
            self._probabilities += probabilities
            self._terms += terms

    def _take(self, inputs: IndexerInputs, settings: LossSettings) -> LossAndGradients:
        target, self._probabilities = self._probabilities, None
        keys, self._keys = self._keys, None

        def loss_of(inputs: IndexerInputs) -> Tensor:
            return compute("index_loss.of_target", inputs.call, inputs, keys, target, settings)

        found = _differentiated(loss_of, inputs)
        # The entropy of the mean attention is not the mean of the entropies. No gradient differs.
        terms = self._terms - _entropy_terms(target, 1)
        return found._replace(loss=found.loss + (terms * settings.loss_scale).float())


class OverAllKeys(ServedLoss):
    """Keeps the gradients of the indexer's projections: a target over all keys would be [s, t]. A
    recompute runs the later layers first, so the projections are kept from the forward pass on."""

    _inputs: IndexerInputs | None = None
    _settings: LossSettings | None = None
    _found: LossAndGradients | None = None

    def begin(self, inputs: IndexerInputs, settings: LossSettings) -> None:
        if self._inputs is None:
            self._inputs, self._settings = IndexerInputs(*(t.detach() for t in inputs)), settings

    def _add(self, attention: AttentionInputs, tp_group: ProcessGroup | None) -> None:
        if self._inputs is None:
            raise GLM5PatchError(
                "a skip layer adds its part to an indexer's loss before the layer that selected "
                f"ran with gradients; run its layers in order, or {INSTEAD}"
            )
        scale = self._settings.loss_scale / self.users
        settings = self._settings._replace(loss_scale=scale, tp_group=tp_group)
        found = _differentiated(
            lambda inputs: loss_under(inputs, attention, settings), self._inputs
        )
        if self._found is None:
            gradients = tuple(gradient.float() for gradient in found.gradients)
            self._found = found._replace(gradients=gradients)
            return
        for total, gradient in zip(self._found.gradients, found.gradients):
            total += gradient
        self._found = self._found._replace(loss=self._found.loss + found.loss)

    def _take(self, inputs: IndexerInputs, settings: LossSettings) -> LossAndGradients:
        found, self._found, self._inputs = self._found, None, None
        gradients = (gradient.to(like.dtype) for gradient, like in zip(found.gradients, inputs))
        return found._replace(gradients=tuple(gradients))


def loss_in_backward(
    inputs: IndexerInputs, take: Callable[[IndexerInputs], LossAndGradients], always: bool
) -> Tensor:
    """A loss that is computed in the backward pass alone: a scalar 0 with its gradients.

    Args:
        inputs: the indexer's projections, with the graph of the parameters that the loss trains.
        take: computes the loss and its gradients.
        always: also where no such parameter trains.
    """
    anchor = inputs.weights.new_zeros((), requires_grad=always)
    return _LossInBackward.apply(anchor, *inputs, take)


class _LossInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, query, key, weights, take):
        ctx.save_for_backward(query, key, weights)
        ctx.take = take
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad_output):
        gradients = ctx.take(IndexerInputs(*ctx.saved_tensors)).gradients
        return None, *(grad * grad_output.to(grad.dtype) for grad in gradients), None


def _differentiated(
    loss_of: Callable[[IndexerInputs], Tensor], inputs: IndexerInputs
) -> LossAndGradients:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        loss = loss_of(IndexerInputs(*leaves))
    return LossAndGradients(loss.detach(), torch.autograd.grad(loss, leaves))


def _entropy_terms(probabilities: Tensor, users: int) -> Tensor:
    """The sum of p log p, divided by ``users``, of probabilities that are: a scalar, fp64 because
    the difference of two such is small."""
    parts = probabilities.flatten(0, 1).split(ROWS)
    return sum(torch.xlogy(part, part * users).sum(dtype=torch.float64) for part in parts)
