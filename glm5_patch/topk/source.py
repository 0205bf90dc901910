"""Which keys the queries of a layer attend to: computed, carried or replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.fields import DENSE_WARMUP, PHASE, REPLAY, attends_to_every_key
from ..config.schedule import IndexSchedule
from ..errors import GLM5PatchError
from ..ops.index_loss.served import OverAllKeys, OverSelectedKeys, ServedLoss
from ..ops.index_topk.reference import IndexerInputs
from ..ops.query_positions import QueryPositions
from .carrier import OUTSIDE, TopkCarrier, current_carrier, require_carrier
from .context import current_recorder, replay_is_asked_for
from .mtp import mtp_depth, shares_iterations
from .record import LayerName
from .tokens import Layout

if TYPE_CHECKING:
    from .ahead import Decoded
    from .replay import ForwardReplay, Replayed


class Indexer(Protocol):
    """What a computing layer selects its keys with."""

    def inputs(self, hidden_states: Tensor, q_latent: Tensor, layout: Layout) -> IndexerInputs: ...

    def select(self, inputs: IndexerInputs, queries: QueryPositions) -> Tensor: ...

    def scoring(self, inputs: IndexerInputs) -> tuple[IndexerInputs, float]: ...


class Selection(NamedTuple):
    """The top-k of one layer for the tokens of one forward."""

    topk_indices: Tensor | None
    """int32 [b, s, k], see ``selected_keys``; None: every visible key of all queries."""
    indexer_inputs: IndexerInputs | None
    """What the layer's index scores are made of; None unless the layer computes and they were asked
    for or needed."""


class TopkSource:
    """Answers what the top-k of one layer is: computed by its own indexer, replayed from a
    recording, or carried from the computing layer whose top-k it reuses, on this pipeline stage or
    an earlier one.

    A layer of multi-token prediction computes, and shares with no other layer. Applied several
    times, it may share the top-k of its first application with the later ones.
    """

    def __init__(self, config, layer_number: int) -> None:
        """Must be called while the layer is built, see ``mtp_depth``.

        Raises:
            ScheduleError: the decoder's schedule is wrong.
        """
        self.config = config
        self.layer_number = layer_number
        self.index_topk = config.dsa_indexer_topk
        self.schedule = IndexSchedule.from_megatron(config)
        self.mtp_depth = mtp_depth(layer_number, self.schedule.num_layers)
        """The depth of multi-token prediction, from 1; None of a decoder layer."""
        self.source = layer_number if self.is_mtp else self.schedule.source(layer_number)
        """The number of the layer that computes the top-k."""
        self.users = 1 + len(self.schedule.consumers(self.source)) if not self.is_mtp else 1
        """How many layers, or iterations of this one, attend to the top-k of ``source``."""
        if self.is_mtp and shares_iterations(config):
            self.users = config.mtp_num_layers
        self.requires_replay = getattr(config, REPLAY, False) and not self.is_mtp

    @property
    def is_mtp(self) -> bool:
        """Whether the layer belongs to multi-token prediction."""
        return self.mtp_depth is not None

    @property
    def computes(self) -> bool:
        """Whether the layer has an indexer."""
        return self.source == self.layer_number

    @property
    def name(self) -> LayerName:
        """What recordings call the layer, in the forward that is running. Of a HybridModel, which
        counts MLPs as layers, the number is that in the same GPTModel. Each iteration of an MTP
        layer that is applied several times is a depth of its own."""
        if not self.is_mtp:
            return LayerName(False, self.schedule.attention_number(self.layer_number))
        carrier = current_carrier()
        return LayerName(True, self.mtp_depth + (0 if carrier is None else carrier.iteration))

    def carrier(self) -> TopkCarrier:
        """The carrier of the forward that is running. Raises MissingTopkError where there is
        none."""
        return require_carrier(self.layer_number, self.source)

    def served_loss(self, sparse: bool) -> tuple[ServedLoss, int]:
        """What the users of this layer's top-k add to its indexer's loss in the forward that is
        running, and which of them runs.

        Args:
            sparse: whether the loss is over the selected keys alone.
        """
        carrier = self.carrier()
        user = carrier.iteration if self.is_mtp else self.layer_number
        losses = (carrier.first_iteration or carrier).served_losses
        if self.source not in losses:
            losses[self.source] = (OverSelectedKeys if sparse else OverAllKeys)(self.users)
        return losses[self.source], user

    def fetch_next(self, output: Tensor) -> None:
        """Let the top-k that the backward needs next come from host memory once the gradient of
        this layer's output is there. Before that, the rest of the layer needs the memory.

        Args:
            output: of this layer's attention.
        """
        carrier = current_carrier()
        memory = None if carrier is None else carrier.host_memory
        if memory is not None and self.computes and output.requires_grad:
            output.register_hook(lambda _: memory.fetch_before(self.source))

    def selection(
        self,
        indexer: Indexer | None,
        hidden_states: Tensor,
        q_latent: Tensor,
        layout: Layout,
        wants_inputs: bool = False,
    ) -> Selection:
        """The top-k of this layer for these tokens. Where every key fits, no layer selects.

        Args:
            indexer: of a computing layer. Passed with each call, because the module may be replaced
                after the layer is built.
            hidden_states: [s, b, h], or [s / tp, b, h] under sequence parallelism.
            q_latent: normalised, [s, b, q_lora_rank] likewise.
            layout: where the tokens stand.
            wants_inputs: whether a computing layer returns ``indexer_inputs`` in any case.

        Raises:
            MissingTopkError: a skip layer found no top-k of its source.
            GLM5PatchError: recordings do not fit the batch or the model, or there are none and
                ``dsa_topk_replay=True``.
        """
        every_key_fits = layout.every_key_is_selected(self.config)
        carrier, b = current_carrier(), hidden_states.shape[1]
        if attends_to_every_key(self.config):
            self._refuse_recordings(carrier)
        recorder = None if carrier is None else carrier.recorder
        if not self.computes:
            if recorder is not None:
                recorder.begin(layout, self.index_topk, b)
            return Selection(self._carried(every_key_fits), None)
        saved_in = carrier
        if self.is_mtp and carrier is not None:
            first = carrier.first_iteration
            if first is not carrier and first is not None:
                topk_indices = None if every_key_fits else first.published(self.layer_number)
                return Selection(topk_indices, None)
            # Under a decoder's carrier its number may be that of another layer.
            saved_in = carrier if carrier.is_of_mtp else None
        replay = self._replay(carrier, layout, b)
        # In a recompute the forward pass has published: both passes must attend to the same keys,
        # and a second selection costs time.
        topk_indices = None if saved_in is None else saved_in.published(self.layer_number)
        selects = topk_indices is None and not every_key_fits
        replayed = None
        if selects and replay is not None:
            replayed = replay.keys(self.name, layout.queries, b, self.index_topk)
        wants_scores = selects and (replayed is None or replayed.wants_scores)
        inputs = None
        if wants_scores or wants_inputs:
            inputs = indexer.inputs(hidden_states, q_latent, layout)
        if selects and replayed is not None:
            topk_indices = self._completed(indexer, inputs, layout, replayed)
        elif selects:
            topk_indices = _select(indexer, inputs, layout)  # int32 [b, s, k]
        if selects and saved_in is not None:
            schedule = None if self.is_mtp else self.schedule
            saved_in.publish(self.layer_number, topk_indices, schedule)
        if recorder is not None and self.name not in carrier.recorded:
            carrier.recorded.add(self.name)
            recorder.add(self.name, topk_indices, layout, self.index_topk, b)
        return Selection(topk_indices, inputs)

    def _refuse_recordings(self, carrier: TopkCarrier | None) -> None:
        asked = carrier is not None and (carrier.recorder or carrier.replay)
        if asked or replay_is_asked_for() or current_recorder() is not None:
            raise GLM5PatchError(
                f"layer {self.layer_number}: {PHASE}={DENSE_WARMUP!r} selects no keys to record or "
                "to replay; train in another phase"
            )

    def _replay(self, carrier: TopkCarrier | None, layout: Layout, b: int) -> ForwardReplay | None:
        """The recordings that this layer replays, if any, compared with its batch."""
        if carrier is None:
            asks = self.requires_replay or replay_is_asked_for() or current_recorder() is not None
            if asks:
                raise GLM5PatchError(
                    f"layer {self.layer_number}: record_topk and replay_topk can't reach it, "
                    f"because it {OUTSIDE}"
                )
            return None
        if carrier.replay is not None:
            computing = map(self.schedule.attention_number, self.schedule.computing_layers)
            carrier.replay.check(layout, b, self.index_topk, tuple(computing))
            return carrier.replay if carrier.replay.replays(self.name) else None
        if self.requires_replay:
            raise GLM5PatchError(
                f"layer {self.layer_number}: {REPLAY}=True, and the forward runs without "
                f"recordings; call the model in a replay_topk block, or set {REPLAY}=False"
            )
        return None

    def _completed(
        self, indexer: Indexer, inputs: IndexerInputs | None, layout: Layout, replayed: Replayed
    ) -> Tensor:
        """The recorded top-k, int32 [b, s, k], compared with the indexer's if a report is wanted;
        where nothing is recorded, the indexer selects."""
        decoded = replayed.decoded
        if replayed.report is not None:
            scoring = indexer.scoring(inputs)
            replayed.report.add(self.name, *scoring, layout.queries, decoded, layout.real)
        if decoded.missing is not None:
            _select_missing(indexer, inputs, layout, decoded)
        return decoded.topk_indices

    def _carried(self, every_key_fits: bool) -> Tensor | None:
        # Required of short sequences too, so that a stack without a carrier fails at once.
        carrier = self.carrier()
        if every_key_fits:
            return None
        if carrier.arrived is not None and carrier.published(self.source) is None:
            carrier.adopt(self.layer_number, self.source, self.index_topk, self.schedule)
        return carrier.read(self.layer_number, self.source)


def _select_missing(
    indexer: Indexer, inputs: IndexerInputs, layout: Layout, decoded: Decoded
) -> None:
    """Let the indexer select for the queries that are not recorded, in place."""
    rows = decoded.missing_rows
    if not len(rows):
        return
    inputs = inputs._replace(query=inputs.query[rows], weights=inputs.weights[rows])
    selected = indexer.select(inputs, layout.queries.of_queries(rows))  # int32 [b, rows, k]
    missing = decoded.missing[:, rows, None]
    topk_indices = decoded.topk_indices
    topk_indices[:, rows] = torch.where(missing, selected, topk_indices[:, rows])


def _select(indexer: Indexer, inputs: IndexerInputs, layout: Layout) -> Tensor:
    """The top-k of this rank's queries, int32 [b, s, k]; other ranks may select for some."""
    deal = layout.deal
    if deal is None:
        return indexer.select(inputs, layout.queries)
    with torch.no_grad():
        dealt = IndexerInputs(deal.out(inputs.query), inputs.key, deal.out(inputs.weights))
        topk_indices = indexer.select(dealt, deal.queries)
        return deal.back(topk_indices.transpose(0, 1)).transpose(0, 1).contiguous()
