from types import SimpleNamespace

import pytest
import torch

from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import MissingTopkError
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.topk.carrier import carried, current_carrier, open_carrier, require_carrier

SCHEDULE = IndexSchedule.from_types("FSSFS", 5)


def topk(value):
    return torch.full((1, 2, 3), value, dtype=torch.int32)


def test_an_entry_is_freed_after_its_last_reader():
    with open_carrier() as carrier:
        carrier.publish(1, topk(1), SCHEDULE)
        assert carrier.read(2, 1)[0, 0, 0] == 1
        assert carrier.held_layers == (1,)
        carrier.read(3, 1)
        assert carrier.held_layers == ()


def test_a_layer_without_readers_is_not_kept():
    with open_carrier() as carrier:
        carrier.publish(1, topk(1), IndexSchedule.from_types("FF", 2))
        assert carrier.held_layers == ()


def test_an_entry_read_in_a_checkpoint_is_kept_for_the_recompute():
    with open_carrier() as carrier:
        carried(lambda: carrier.publish(1, topk(1), SCHEDULE))()
        read = carried(lambda: carrier.read(2, 1))
        read()
        carrier.read(3, 1)
        assert carrier.held_layers == (1,)
    assert current_carrier() is None
    assert read()[0, 0, 0] == 1


def test_an_entry_made_outside_a_checkpoint_is_kept_for_a_reader_inside_one():
    """As where some layers of a group are recomputed, and not the one that computes."""
    with open_carrier() as carrier:
        carrier.publish(1, topk(1), SCHEDULE)
        read = carried(lambda: carrier.read(2, 1))
        read()
        carrier.read(3, 1)
    assert read()[0, 0, 0] == 1


def test_a_recompute_sees_its_own_forward_and_not_the_latest():
    reads = []
    for value in (1, 2):
        with open_carrier() as carrier:
            carried(lambda c=carrier, v=value: c.publish(1, topk(v), SCHEDULE))()
            reads.append(carried(lambda: current_carrier().read(2, 1)))
    assert [int(read()[0, 0, 0]) for read in reads] == [1, 2]
    with open_carrier() as carrier:  # of a third forward, during which the others recompute
        carrier.publish(1, topk(3), SCHEDULE)
        assert [int(read()[0, 0, 0]) for read in reads] == [1, 2]


def test_functions_are_left_alone_where_no_carrier_is_open():
    def function():
        pass

    assert carried(function) is function


def test_a_missing_source_is_named_with_what_to_check():
    with pytest.raises(MissingTopkError, match="layer 3 is a skip layer.*layer 1.*carrier"):
        require_carrier(3, 1)
    with open_carrier() as carrier, pytest.raises(MissingTopkError, match="pipeline split"):
        carrier.read(3, 1)


def test_what_a_checkpoint_runs_again_shows_its_module():
    """verl looks for an MTP layer in the closure, whose inputs it must not free."""
    layer = torch.nn.Linear(1, 1)
    with open_carrier():
        run = carried(lambda x: layer(x))
    assert layer in [cell.cell_contents for cell in run.__closure__]
    assert torch.equal(run(torch.ones(1)), layer(torch.ones(1)))


@pytest.mark.parametrize(
    ("longest", "bytes_of_a_key"), [(65535, 2), (65536, 4), (None, 4)], ids=["fits", "long", "open"]
)
def test_what_only_recomputes_read_takes_16_bits_if_positions_fit(longest, bytes_of_a_key):
    keys = torch.tensor([[[0, 1, 32766, 32767, 32768, 65534, -1]]], dtype=torch.int32)
    queries = QueryPositions(torch.zeros(1, dtype=torch.int64), longest=longest)
    with open_carrier() as carrier:
        carrier.layout = None if longest is None else SimpleNamespace(queries=queries)
        carried(lambda: carrier.publish(1, keys, SCHEDULE))()
        readers = [carried(lambda n=n: carrier.read(n, 1)) for n in (2, 3)]
        assert readers[0]().data_ptr() == keys.data_ptr()  # no copy while the forward reads it
        assert torch.equal(readers[1](), keys)
        alone = carried(lambda: carrier.publish(4, keys, IndexSchedule.from_types("FSSF", 4)))
        alone()
    held = [slot.kept.element_size() for slot in carrier._slots.values()]
    assert held == [bytes_of_a_key] * 2
    for read in readers:  # the recompute
        assert torch.equal(read(), keys) and read().dtype == torch.int32
    assert torch.equal(carrier.published(4), keys)
    assert [slot.kept.element_size() for slot in carrier._slots.values()] == held
