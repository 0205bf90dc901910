"""How a computing layer's top-k reaches the skip layers: one carrier per forward of a stack.

A stack is what runs layers in order: a ``TransformerBlock``, a ``HybridStack`` or one depth of
multi-token prediction. The carrier is found through a context variable while the forward runs, and
through the closure of the checkpointed function while a recompute runs. It belongs to one forward
alone, so two microbatches in flight can't see each other's (Megatron-LM #6793 is what happens
otherwise).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import MissingTopkError
from .context import begin_replay, current_recorder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.schedule import IndexSchedule
    from ..ops.index_loss.served import ServedLoss
    from .offload import HostMemory
    from .record import LayerName, TopkRecorder
    from .replay import ForwardReplay
    from .stages import StageTopk
    from .tokens import Layout


def _grad_enabled() -> bool:
    import torch  # this module is imported where torch may be half-imported

    return torch.is_grad_enabled()


MOST_KEYS_IN_16_BITS = 65535
"""Of a document: its positions and the -1 of an empty place are as many numbers as 16 bits have."""
_OFFSET = 32767
"""-1 minus it is the smallest of them."""


@dataclass
class _Slot:
    kept: Tensor | None
    """The top-k; once only recomputes read it, in 16 bits if its positions fit, or in host memory
    alone (None)."""
    readers_left: int
    recomputed: bool
    """Some layer of the group runs in a checkpoint, so the backward pass needs the top-k too."""
    waits: bool = False
    """Whether only recomputes will read it, and it takes as little memory as it may."""


@dataclass
class TopkCarrier:
    """What the layers of one forward share: the top-k of the computing layers, and the layout.

    Top-k are int32 [b, s, index_topk], freed after the last skip layer that reads them, unless
    a checkpoint will run one of the readers again; then they live as long as its graph, in 16 bits
    if no document is longer than ``MOST_KEYS_IN_16_BITS``, and in host memory if there is any.
    """

    layout: Layout | None = None
    """Where the tokens of this forward stand; see ``Layout.of``."""
    host_topk: dict[int, Tensor] = field(default_factory=dict)
    """What the host's own ``DSAttention`` keeps by layer number: top-k."""
    host_topk_lengths: dict[int, Tensor] = field(default_factory=dict)
    """Likewise: how many entries of each row of it count, where a kernel says so."""
    arrived: StageTopk | None = None
    """What the stage before sent, until its first reader here decodes it."""
    first_iteration: TopkCarrier | None = None
    """Of an MTP layer whose iterations share one top-k: the carrier that has it, maybe this one."""
    iteration: int = 0
    """Of an MTP layer that is applied several times: how many iterations came before."""
    is_of_mtp: bool = False
    """Whether it belongs to an application of an MTP layer."""
    served_losses: dict[int, ServedLoss] = field(default_factory=dict)
    """By the computing layer: what the layers that use its top-k add to its indexer's loss."""
    records_gradients: bool = field(default_factory=_grad_enabled)
    """Whether the forward does. A checkpoint switches that off inside, and its recompute on."""
    recorder: TopkRecorder | None = field(default_factory=current_recorder)
    """Of the ``record_topk`` block that the forward runs in."""
    recorded: set[LayerName] = field(default_factory=set)
    """Layers that the recorder has; a recompute records none again."""
    replay: ForwardReplay | None = field(default_factory=begin_replay)
    """Of the ``replay_topk`` block that the forward runs in; a recompute keeps it."""
    host_memory: HostMemory | None = None
    """Where top-k wait that only recomputes will read; None: on the device."""
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _in_checkpoint: bool = False

    def publish(
        self, layer_number: int, topk_indices: Tensor, schedule: IndexSchedule | None
    ) -> None:
        """Keep a computing layer's top-k for its recompute and the layers that reuse it; without a
        schedule, no layer does."""
        readers = 0 if schedule is None else len(schedule.consumers(layer_number))
        if readers or self._in_checkpoint or self.first_iteration is self:
            self._slots[layer_number] = _Slot(topk_indices, readers, self._in_checkpoint)
            self._put_away(layer_number)

    def adopt(
        self, layer_number: int, source: int, index_topk: int, schedule: IndexSchedule
    ) -> None:
        """Keep what arrived from the stage before as the top-k of ``source``.

        Args:
            layer_number: the first layer of this stage that reads it.
            source: the computing layer, on an earlier stage.
            index_topk: keys of a query.
            schedule: the model's.
        """
        topk_indices = self.arrived.decode(self.layout, index_topk)
        readers = sum(consumer >= layer_number for consumer in schedule.consumers(source))
        self._slots[source] = _Slot(topk_indices, readers, self._in_checkpoint)
        self.arrived = None

    def end_forward(self) -> None:
        """Free what no layer of this stage and no recompute will read."""
        self.arrived = None
        self._slots = {n: slot for n, slot in self._slots.items() if slot.recomputed}
        for layer_number, slot in self._slots.items():
            slot.readers_left = 0  # the others are on later stages
            self._put_away(layer_number)

    def published(self, layer_number: int) -> Tensor | None:
        """What a computing layer published earlier in this forward: in a recompute, its own."""
        slot = self._slots.get(layer_number)
        if slot is None:
            return None
        kept = self.host_memory.take(layer_number) if slot.kept is None else slot.kept
        return kept.int().add_(_OFFSET) if kept.element_size() == 2 else kept

    def read(self, layer_number: int, source: int) -> Tensor:
        """The top-k of ``source`` for the skip layer ``layer_number``.

        Raises:
            MissingTopkError: nothing was published for ``source`` in this forward.
        """
        slot = self._slots.get(source)
        if slot is None:
            raise _missing(layer_number, source, "published no top-k in this forward")
        slot.readers_left -= 1
        slot.recomputed |= self._in_checkpoint
        topk_indices = self.published(source)
        if slot.readers_left <= 0 and not slot.recomputed:
            del self._slots[source]
        else:
            self._put_away(source)
        return topk_indices

    def _put_away(self, layer_number: int) -> None:
        """Let a top-k take less memory, if only recomputes will read it: half if its positions are
        sure to fit, and none of the device if it may leave. That of multi-token prediction stays,
        since its backward comes first."""
        slot = self._slots[layer_number]
        if slot.waits or slot.readers_left > 0 or not slot.recomputed:
            return
        slot.waits = True
        if self.layout is not None and self.layout.queries.most_keys <= MOST_KEYS_IN_16_BITS:
            slot.kept = (slot.kept - _OFFSET).short()
        if self.host_memory is not None and not self.is_of_mtp:
            self.host_memory.put(layer_number, slot.kept)
            slot.kept = None

    @property
    def held_layers(self) -> tuple[int, ...]:
        """The computing layers whose top-k is kept."""
        return tuple(self._slots)


_current: ContextVar[TopkCarrier | None] = ContextVar("glm5_patch_topk_carrier", default=None)


def current_carrier() -> TopkCarrier | None:
    """The carrier of the forward or recompute that is running in this thread."""
    return _current.get()


OUTSIDE = (
    "runs outside TransformerBlock, HybridStack and their recompute. A loop of your own over the "
    "layers can be wrapped in `with glm5_patch.topk.carrier.open_carrier():`, one for each "
    "forward; recompute by megatron.core.tensor_parallel.checkpoint, which puts the carrier back"
)


def require_carrier(layer_number: int, source: int) -> TopkCarrier:
    """Raises MissingTopkError outside the forward of a stack."""
    carrier = _current.get()
    if carrier is None:
        raise _missing(layer_number, source, f"is out of reach: the layer {OUTSIDE}")
    return carrier


@contextmanager
def open_carrier(carrier: TopkCarrier | None = None) -> Iterator[TopkCarrier]:
    """Make a carrier the current one: a new one for the forward of a stack."""
    begins = carrier is None
    carrier = TopkCarrier() if begins else carrier
    token = _current.set(carrier)
    try:
        yield carrier
    finally:
        _current.reset(token)
        if begins and carrier.replay is not None:
            carrier.replay.end_forward()


def carried(function: Callable) -> Callable:
    """``function``, to be run now and again in a recompute, always with today's carrier.

    Returned unchanged where no carrier is open, so a model that is not GLM-5 pays nothing.
    """
    carrier = _current.get()
    if carrier is None:
        return function
    module = _module_in_closure(function)

    @functools.wraps(function)
    def run(*args, **kwargs):
        module  # noqa: B018 - verl looks for an MTP layer here, whose inputs it must not free
        before, carrier._in_checkpoint = carrier._in_checkpoint, True
        try:
            with open_carrier(carrier):
                return function(*args, **kwargs)
        finally:
            carrier._in_checkpoint = before

    return run


def _module_in_closure(function: Callable) -> torch.nn.Module | None:
    """The module whose forward a checkpointed function runs, if it is one of a closure."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found = cell.cell_contents
        except ValueError:  # it is not set yet
            continue
        if hasattr(found, "named_modules"):
            return found
    return None


def _missing(layer_number: int, source: int, cause: str) -> MissingTopkError:
    return MissingTopkError(
        f"layer {layer_number} is a skip layer and reuses the top-k of layer {source}, which "
        f"{cause}. Layers {source} to {layer_number} must run in order in one forward, on one "
        "pipeline stage unless dsa_topk_across_stages=True; check the pipeline split and "
        "`glm5-patch doctor`."
    )
