"""Where the tokens of one batch stand: worked out once a forward, for all its layers.

Context parallelism splits a sequence between ranks, and tensor parallelism splits a rank's part of
it again where its ranks share tokens out. Queries stay where they are. What the keys are made of is
gathered: the indexer's key, and the key-value latent with its rotary part (576 wide, where the keys
and values of 64 heads are 32768).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import env
from ..config.fields import CONTIGUOUS, ZIGZAG, attends_to_every_key
from ..errors import GLM5PatchError
from ..ops.gathering import Gathering, Order
from ..ops.query_positions import (
    QueryPositions,
    document_bounds,
    document_starts,
    longest_document,
)
from .carrier import current_carrier
from .documents import Documents, real_queries

DEALT_FROM = 16384
"""Keys of the longest document from which on rows of index scores are dealt out evenly. Below, the
exchange costs what it saves."""


class Shared(NamedTuple):
    """What the ranks of tensor parallelism share out in sparse attention."""

    tokens: bool
    """Each rank has all heads of its own tokens; else its own heads of all tokens."""
    reason: str


def shared_out(config) -> Shared:
    """What ``GLM5_PATCH_TP`` asks for, or the better of what is possible.

    A query reads all its selected latents for however few heads a rank has, so tokens are shared
    out wherever the hidden states are split by them already: under sequence parallelism.

    Raises:
        GLM5PatchError: tokens are asked for, and the hidden states are not split.
    """
    asked = env.tensor_parallel()
    if asked == "heads":
        return Shared(False, f"{env.TENSOR_PARALLEL}=heads")
    if config.sequence_parallel:
        return Shared(True, f"{env.TENSOR_PARALLEL}={asked}")
    if asked == "tokens" and config.tensor_model_parallel_size > 1:
        raise GLM5PatchError(
            f"{env.TENSOR_PARALLEL}=tokens with sequence_parallel=False and "
            f"tensor_model_parallel_size={config.tensor_model_parallel_size}: the hidden states "
            "are not split by tokens; set sequence_parallel=True (--sequence-parallel), or "
            f"{env.TENSOR_PARALLEL}=auto"
        )
    return Shared(False, "sequence_parallel=False")


def token_group(config, pg_collection) -> ProcessGroup | None:
    """The tensor-parallel ranks that share the tokens of a sequence out; None where one rank has
    them all, or they share the heads out.

    Raises:
        GLM5PatchError: as of ``shared_out``.
    """
    if config.tensor_model_parallel_size == 1 or not shared_out(config).tokens:
        return None
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp"])
    return groups.tp


def head_group(config, pg_collection) -> ProcessGroup | None:
    """The tensor-parallel ranks that share the heads out; None where one rank has all of its
    tokens'.

    Raises:
        GLM5PatchError: as of ``shared_out``.
    """
    if config.tensor_model_parallel_size == 1 or shared_out(config).tokens:
        return None
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp"])
    return groups.tp


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of this rank among those of the batch.

    In the shapes, s is the length of a context-parallel rank's part, and own that of this rank's:
    s / tp where tokens are shared out, else s.
    """

    queries: QueryPositions
    """Of this rank, [own]."""
    everyone: QueryPositions
    """Of all the ranks that share the tokens out, [s]."""
    split: ContextParallel | None = None
    """If the sequence is split by context parallelism."""
    token_group: ProcessGroup | None = None
    """The ranks that share the tokens out; None: this rank has them all."""
    real: Tensor | None = None
    """int64: the queries of this rank that are not padding; None: all of them."""
    deal: Deal | None = None
    """How rows of index scores are dealt out; None: each rank has those of its own queries."""
    num_real: float | None = None
    """How many queries of all the ranks that share the tokens out are not padding; on average over
    the context-parallel ranks, since data parallelism averages what they find."""
    documents: Documents | None = None
    """Of the batch; None of a layout that is none of a forward."""
    _made: dict[Hashable, Any] = field(default_factory=dict)
    """See ``once``."""

    @classmethod
    def of(
        cls,
        config,
        cp_group,
        packed_seq_params,
        length: int,
        device,
        token_group: ProcessGroup | None = None,
    ) -> Layout:
        """The layout of the forward that is running; bounds of a pack are read from the device
        once.

        Args:
            config: of the model.
            cp_group: the context-parallel group.
            packed_seq_params: documents of a pack.
            length: s, the tokens of a context-parallel rank.
            device: of the indices.
            token_group: see ``token_group``.
        """
        carrier = current_carrier()
        if carrier is not None and carrier.layout is not None:
            return carrier.layout
        split = None
        if config.context_parallel_size > 1:
            order = config.dsa_context_parallel_order
            split = ContextParallel(cp_group, packed_seq_params, length, device, order)
        everyone = split.queries if split else QueryPositions.of(packed_seq_params, length, device)
        own, queries, deal = slice(None), everyone, None
        if token_group is not None:
            part = length // token_group.size()
            own = slice(token_group.rank() * part, (token_group.rank() + 1) * part)
            queries = everyone.of_queries(own)
            deal = Deal(everyone, token_group) if everyone.most_keys >= DEALT_FROM else None
        is_real = real_queries(packed_seq_params, everyone)  # bool [s]
        real, num_real = None, length
        if is_real is not None:
            total = is_real.sum()
            if split is not None:
                torch.distributed.all_reduce(total, group=cp_group)
            num_real = total.item() / config.context_parallel_size
            is_real = is_real[own]
            real = is_real.nonzero().squeeze(1)
            real = None if len(real) == len(is_real) else real
        layout = cls(
            queries,
            everyone,
            split,
            token_group,
            real,
            deal,
            num_real,
            Documents(config, packed_seq_params, queries),
        )
        if carrier is not None:
            carrier.layout = layout
        return layout

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What every layer of the forward needs alike: made by the first one, and kept for the
        others and for recomputes.

        Args:
            key: the same where the same is made.
            make: makes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def every_key_is_selected(self, config) -> bool:
        """Whether no layer needs to select: every key fits, or the attention is dense."""
        return attends_to_every_key(config) or self.queries.all_fit(config.dsa_indexer_topk)

    def gather(self, tensor: Tensor) -> Gathering:
        """Start to gather [own, ...] of every rank; what comes is the whole sequence in natural
        order, [t, ...]. Gradients go back summed."""
        if self.split is None:
            return Gathering(tensor, self.token_group)
        if self.token_group is not None:
            tensor = Gathering(tensor, self.token_group).wait()
        return self.split.gather(tensor)

    def all_heads(self, tensor: Tensor, width: int) -> Tensor:
        """This rank's heads of all tokens, [s, b, n * width] -> all heads of its own tokens, a view
        [own, b, tp, n, width]; tp is 1 where heads are shared out."""
        s, b, _ = tensor.shape
        if self.token_group is None:
            return tensor.unflatten(-1, (1, -1, width))
        size = self.token_group.size()
        received = all_to_all(self.token_group, tensor)  # [s, b, n * width], from rank to rank
        return received.view(size, s // size, b, -1, width).permute(1, 2, 0, 3, 4)

    def own_heads(self, tensor: Tensor) -> Tensor:
        """All heads of this rank's tokens, [own, b, tp * n * width] -> its heads of all tokens,
        [s, b, n * width]."""
        if self.token_group is None:
            return tensor
        by_rank = tensor.unflatten(-1, (self.token_group.size(), -1)).movedim(2, 0)
        # [tp, own, b, n * width] -> [s, b, n * width]
        return all_to_all(self.token_group, by_rank.contiguous()).flatten(0, 1)

    def gather_heads(self, tensor: Tensor) -> Gathering:
        """Start to gather [n * width, ...] of every rank's heads; what comes is of all heads,
        [tp * n * width, ...]. Gradients go back summed."""
        return Gathering(tensor, self.token_group)


class Deal:
    """Rows of index scores dealt out evenly between the ranks that share the tokens out.

    A row costs as much as its query sees keys, so the last of four ranks would have 1.75 times the
    mean. Here each rank has a chunk of rows from either end.
    """

    def __init__(self, everyone: QueryPositions, group: ProcessGroup) -> None:
        """Work out who sends what.

        Args:
            everyone: the queries of all ranks.
            group: the ranks.
        """
        size, rank = group.size(), group.rank()
        own = len(everyone.starts) // size
        lengths = own // 2, own - own // 2  # each rank's rows are two chunks
        received = rank, 2 * size - 1 - rank
        self._group = group
        self._sent_to, self._received_from = [0] * size, [0] * size
        for half in (0, 1):
            chunk = 2 * rank + half
            self._sent_to[min(chunk, 2 * size - 1 - chunk)] += lengths[half]
        # What is sent lies in the order of the ranks; of the later rows the last goes to the first.
        self._first = lengths[0] if 2 * rank >= size else 0
        rows = []
        for chunk in received:
            owner, half = divmod(chunk, 2)
            self._received_from[owner] += lengths[half]
            first = owner * own + half * lengths[0]
            rows.append(torch.arange(first, first + lengths[half], device=everyone.starts.device))
        self.queries = everyone.of_queries(torch.cat(rows))
        """Those of the rows that this rank has been dealt."""

    def out(self, tensor: Tensor) -> Tensor:
        """[own, ...] of this rank's queries -> [own, ...] of the rows that it is dealt."""
        tensor = tensor.roll(-self._first, 0) if self._first else tensor
        return self._exchange(tensor, self._sent_to, self._received_from)

    def back(self, tensor: Tensor) -> Tensor:
        """The way back."""
        tensor = self._exchange(tensor, self._received_from, self._sent_to)
        return tensor.roll(self._first, 0) if self._first else tensor

    def _exchange(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        found = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(
            found, tensor.contiguous(), received, sent, group=self._group
        )
        return found


class ContextParallel:
    """How one batch is split between the ranks of ``group``."""

    def __init__(self, group, packed_seq_params, local_length: int, device, order: str = ZIGZAG):
        """Raises GLM5PatchError for a document that can't be cut into equal chunks (zigzag).

        Args:
            group: the context-parallel group.
            packed_seq_params: documents of a pack.
            local_length: tokens that each rank holds.
            device: of the indices made here.
            order: one of ``CONTEXT_PARALLEL_ORDERS``.
        """
        self.group = group
        length = local_length * group.size()
        bounds = document_bounds(packed_seq_params, length)
        held = {ZIGZAG: _zigzag, CONTIGUOUS: _contiguous}[order]
        # Of one document all is made on the device, which the host need not wait for; of many the
        # small pieces are cheaper on the host.
        places = device if len(bounds) == 2 else "cpu"
        positions = [held(bounds, rank, group.size(), places) for rank in range(group.size())]
        own = positions[group.rank()]
        self.queries = QueryPositions(
            document_starts(bounds, places)[own].to(device),
            own.to(device),
            length,
            longest_document(bounds),
        )
        """What the queries of this rank see."""
        positions = torch.cat(positions)
        self._order = Order(positions.argsort().to(device), positions.to(device))

    def gather(self, tensor: Tensor) -> Gathering:
        """Start to gather [s / cp, ...] of every rank; what comes is [s, ...] in natural order.
        Gradients go back summed."""
        return Gathering(tensor, self.group, self._order)


def _contiguous(bounds: list[int], rank: int, size: int, device) -> Tensor:
    part = bounds[-1] // size
    return torch.arange(rank * part, (rank + 1) * part, device=device)


def _zigzag(bounds: list[int], rank: int, size: int, device) -> Tensor:
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    for begin, end in zip(bounds, bounds[1:]):
        chunk, rest = divmod(end - begin, 2 * size)
        if rest:
            raise GLM5PatchError(
                f"a document of {end - begin} tokens can't be split between context_parallel_size="
                f"{size} ranks; pad it to a multiple of {2 * size} (cu_seqlens_q_padded)"
            )
        for number in (rank, 2 * size - 1 - rank):
            first = begin + number * chunk
            parts.append(torch.arange(first, first + chunk, device=device))
    return torch.cat(parts)
