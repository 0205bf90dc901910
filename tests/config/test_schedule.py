import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GlmMoeDsaConfig

from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import ScheduleError

CONFIGS = Path(__file__).parents[1] / "configs"


def published(name):
    return json.loads((CONFIGS / name).read_text())


def test_glm_5_2_computes_on_21_of_78_layers():
    schedule = IndexSchedule.from_hf(published("glm-5.2.json"))
    assert schedule.computing_layers == (1, 2, 3, *range(7, 76, 4))
    assert str(schedule) == "21 of 78 layers compute their top-k"


def test_glm_5_2_means_the_same_by_list_and_by_frequency():
    raw = published("glm-5.2.json")
    by_list = IndexSchedule.from_hf(raw)
    del raw["indexer_types"]
    assert IndexSchedule.from_hf(raw) == by_list
    assert IndexSchedule.from_freq(78, 4, 3) == by_list


def test_glm_5_1_shares_nothing():
    assert not HFConfig(published("glm-5.1.json")).schedule.shares


@pytest.mark.filterwarnings("ignore:index_topk_freq")
@pytest.mark.parametrize("freq", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("offset", [None, 1, 2, 3, 5, 30])
@pytest.mark.parametrize("layers", [1, 2, 8, 23])
def test_frequency_and_offset_mean_what_transformers_makes_of_them(layers, freq, offset):
    fields = {"num_hidden_layers": layers, "index_topk_freq": freq}
    if offset is not None:
        fields["index_skip_topk_offset"] = offset
    theirs = GlmMoeDsaConfig(**fields).indexer_types
    assert list(IndexSchedule.from_hf(fields).types) == theirs


def test_list_beats_pattern_beats_frequency():
    fields = {"num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 1}
    assert IndexSchedule.from_hf(fields).computing_layers == (1, 3)
    fields["index_topk_pattern"] = "FFSS"
    assert IndexSchedule.from_hf(fields).computing_layers == (1, 2)
    fields["indexer_types"] = ["full", "shared", "shared", "full"]
    assert IndexSchedule.from_hf(fields).computing_layers == (1, 4)


def test_the_same_numbers_without_offset_differ_between_hugging_face_and_megatron():
    with pytest.warns(UserWarning, match="mean other layers.*Set the offset"):
        hf = IndexSchedule.from_hf({"num_hidden_layers": 8, "index_topk_freq": 4})
    megatron = IndexSchedule.from_megatron(SimpleNamespace(num_layers=8, dsa_indexer_topk_freq=4))
    assert hf.computing_layers == (1, 2, 6)
    assert megatron.computing_layers == (1, 5)


def test_every_layer_is_computing_or_a_consumer_of_its_source():
    schedule = IndexSchedule.from_types("FFSSFSFS", 8)
    owners = {n: schedule.source(n) for n in range(1, 9)}
    assert owners == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 7, 8: 7}
    for n in schedule.computing_layers:
        assert schedule.consumers(n) == tuple(m for m, s in owners.items() if s == n and m != n)
    assert schedule.consumers(3) == ()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IndexSchedule.from_types("SF", 2), "layer 1 a skip layer"),
        (lambda: IndexSchedule.from_types("FF", 3), "2 entries for num_layers=3"),
        (lambda: IndexSchedule.from_types(["full", "half"], 2), "'half' for layer 2"),
        (lambda: IndexSchedule.from_types([], 0), "empty"),
        (lambda: IndexSchedule.from_freq(4, 0, 1), "topk_freq=0"),
        (lambda: IndexSchedule.from_freq(4, 2, -1), "skip_topk_offset=-1"),
        (lambda: IndexSchedule.from_types("FS", 2).source(3), "layer 3 is outside"),
    ],
)
def test_impossible_schedules_are_named(make, says):
    with pytest.raises(ScheduleError, match=says):
        make()


def test_layers_without_attention_are_counted_and_passed_over():
    """As in a HybridModel: attention and MLP in turn."""
    schedule = IndexSchedule.from_types("FNFNSNFN", 8)
    assert schedule.computing_layers == (1, 3, 7)
    assert schedule.consumers(3) == (5,) and schedule.consumers(1) == schedule.consumers(2) == ()
    assert [schedule.attention_number(n) for n in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    of_rest = [schedule.source_of_rest(n) for n in range(1, 9)]
    assert of_rest == [None, None, None, 3, 3, None, None, None]
    assert str(schedule) == "3 of 4 layers compute their top-k"
    assert schedule.freq_and_offset is None
    with pytest.raises(ScheduleError, match="layer 2 a skip layer"):
        IndexSchedule.from_types("NSF", 3)


def test_a_config_json_has_no_layers_without_attention():
    fields = {"num_hidden_layers": 2, "indexer_types": ["full", "none"]}
    with pytest.raises(ScheduleError, match="indexer_types has 'none'"):
        IndexSchedule.from_hf(fields)
