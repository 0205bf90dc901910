"""One object says which keys a layer attends to: computed by its indexer, or carried."""

from types import SimpleNamespace

import pytest
import torch

from glm5_patch.errors import MissingTopkError
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.topk.carrier import carried, open_carrier
from glm5_patch.topk.mtp import building_mtp
from glm5_patch.topk.source import TopkSource
from glm5_patch.topk.tokens import Layout

INDEX_TOPK, LENGTH = 4, 9
CONFIG = SimpleNamespace(num_layers=3, dsa_indexer_types="FSF", dsa_indexer_topk=INDEX_TOPK)
HIDDEN_STATES, Q_LATENT = torch.zeros(LENGTH, 1, 5), torch.zeros(LENGTH, 1, 3)


class CountingIndexer:
    """Selects other keys with each call, so that a repeated selection shows in the answer."""

    def __init__(self):
        self.projections = self.selections = 0

    def inputs(self, hidden_states, q_latent, layout):
        assert hidden_states is HIDDEN_STATES and q_latent is Q_LATENT
        self.projections += 1
        return f"inputs {self.projections}"

    def select(self, inputs, queries):
        assert inputs == f"inputs {self.projections}" and queries.keys > INDEX_TOPK
        self.selections += 1
        shape = (1, len(queries.starts), INDEX_TOPK)
        return torch.full(shape, self.selections, dtype=torch.int32)


def layout(length=LENGTH):
    queries = QueryPositions.of(None, length, "cpu")
    return Layout(queries, queries)


def selection(source, indexer, length=LENGTH, wants_inputs=False):
    return source.selection(indexer, HIDDEN_STATES, Q_LATENT, layout(length), wants_inputs)


def test_which_layers_compute():
    sources = [TopkSource(CONFIG, number) for number in (1, 2, 3)]
    assert [source.computes for source in sources] == [True, False, True]
    assert [source.source for source in sources] == [1, 1, 3]


def test_a_computing_layer_publishes_and_a_skip_layer_reads():
    indexer = CountingIndexer()
    with open_carrier() as carrier:
        computed = selection(TopkSource(CONFIG, 1), indexer)
        assert carrier.held_layers == (1,)
        read = selection(TopkSource(CONFIG, 2), None, wants_inputs=True)
        assert carrier.held_layers == ()
    assert indexer.selections == 1
    assert computed.topk_indices.unique().tolist() == [1]
    assert read.topk_indices is computed.topk_indices and read.indexer_inputs is None


@pytest.mark.parametrize("wants_inputs", [False, True])
def test_a_recompute_takes_the_saved_top_k_and_selects_nothing(wants_inputs):
    """The indexer's inputs are made again only if its loss needs their graph."""
    indexer, source = CountingIndexer(), TopkSource(CONFIG, 1)
    with open_carrier():
        run = carried(lambda: selection(source, indexer, wants_inputs=wants_inputs))
        first = run()
    with open_carrier():  # of another microbatch
        other = selection(source, indexer)
        again = run()
    assert other.topk_indices.unique().tolist() == [2]
    assert again.topk_indices is first.topk_indices
    assert indexer.selections == 2
    assert again.indexer_inputs == ("inputs 3" if wants_inputs else None)


@pytest.mark.parametrize("length", [1, INDEX_TOPK])
def test_where_every_key_fits_nothing_is_selected(length):
    indexer = CountingIndexer()
    with open_carrier() as carrier:
        for number in (1, 2, 3):
            source = TopkSource(CONFIG, number)
            found = selection(source, indexer if source.computes else None, length)
            assert found == (None, None)
        assert carrier.held_layers == ()
        inputs = selection(TopkSource(CONFIG, 1), indexer, length, wants_inputs=True)
        assert inputs == (None, "inputs 1")
    assert indexer.selections == 0


@pytest.mark.parametrize("number", [1, 4], ids=["numbered from 1", "numbered after the decoder"])
def test_a_layer_of_multi_token_prediction_neither_publishes_nor_reads(number):
    indexer = CountingIndexer()
    with building_mtp(SimpleNamespace(layer_number=1)):
        mtp = TopkSource(CONFIG, number)
    assert mtp.computes
    with open_carrier() as carrier:
        selection(TopkSource(CONFIG, 1), indexer)
        found = carried(lambda: selection(mtp, indexer))()
        assert carrier.held_layers == (1,)
        assert carrier.published(1).unique().tolist() == [1]
    assert found.topk_indices.unique().tolist() == [2]


def test_a_computing_layer_needs_no_carrier():
    indexer = CountingIndexer()
    assert selection(TopkSource(CONFIG, 1), indexer).topk_indices is not None


@pytest.mark.parametrize("length", [INDEX_TOPK, LENGTH])
def test_a_skip_layer_without_a_carrier_is_an_error_at_any_length(length):
    with pytest.raises(MissingTopkError, match="layer 2 is a skip layer.*layer 1"):
        selection(TopkSource(CONFIG, 2), None, length)


def test_a_skip_layer_whose_source_did_not_run_is_an_error():
    with open_carrier(), pytest.raises(MissingTopkError, match="published no top-k"):
        selection(TopkSource(CONFIG, 2), None)
