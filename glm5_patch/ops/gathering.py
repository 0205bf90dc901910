"""A gather over ranks that runs beside what is computed meanwhile, in the forward and the backward.

Autograd runs last what ran first. So what ran between the two halves of a gather in the forward
runs between the two halves of its backward, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Order(NamedTuple):
    """How to put gathered rows in order."""

    places: Tensor
    """int64 [t]: where the row of each position is among those gathered."""
    inverse: Tensor
    """int64 [t]: the position of each row."""


class Gathering:
    """A gather along dimension 0 that has begun: what is launched before ``wait`` runs beside it.
    In the backward the gradients are summed over the ranks beside the backward of the same."""

    def __init__(self, tensor: Tensor, group: ProcessGroup | None, order: Order | None = None):
        """Begin.

        Args:
            tensor: this rank's part.
            group: the ranks; None: this one alone.
            order: of the parts' rows; None: they come in it.
        """
        self._group, self._order = group, order
        self._tensor = tensor
        if group is not None:
            self._tensor = _Begin.apply(tensor.contiguous(), self)

    def wait(self) -> Tensor:
        """What was gathered, once. The host does not wait for a GPU, its stream does."""
        # The graph keeps this object, which must not keep the graph and its memory.
        tensor, self._tensor = self._tensor, None
        return tensor if self._group is None else _Wait.apply(tensor, self)

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's part, once ``gathered`` has returned."""
        whole = part.new_empty((self._group.size() * len(part), *part.shape[1:]))
        self._work = torch.distributed.all_gather_into_tensor(
            whole, part, group=self._group, async_op=True
        )
        return whole

    def gathered(self, whole: Tensor) -> Tensor:
        self._work.wait()
        self._work = None
        return whole if self._order is None else whole.index_select(0, self._order.places)

    def scatter(self, gradient: Tensor) -> None:
        """Start to sum the gradients of all ranks; each gets those of its part."""
        if self._order is not None:
            gradient = gradient.index_select(0, self._order.inverse)
        gradient = gradient.contiguous()
        part = gradient.new_empty((len(gradient) // self._group.size(), *gradient.shape[1:]))
        work = torch.distributed.reduce_scatter_tensor(
            part, gradient, group=self._group, async_op=True
        )
        self._scattering = work, part

    def scattered(self) -> Tensor:
        (work, part), self._scattering = self._scattering, None
        work.wait()
        return part


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, gathering):
        ctx.gathering = gathering
        return gathering.gather(part)

    @staticmethod
    def backward(ctx, _):
        return ctx.gathering.scattered(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, gathering):
        ctx.gathering = gathering
        return gathering.gathered(whole)

    @staticmethod
    def backward(ctx, gradient):
        ctx.gathering.scatter(gradient)
        return gradient, None  # for ``_Begin``, which has its own
