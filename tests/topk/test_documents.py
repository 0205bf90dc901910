"""How long a recording may be beside its document, and which layers and forwards it is of."""

from types import SimpleNamespace

import pytest
import torch

from glm5_patch import record_topk
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.tools.verify import forward
from glm5_patch.topk.documents import Documents
from glm5_patch.topk.record import TopkRecorder
from tests.distributed.cases import RECOMPUTE
from tests.tiny import megatron_model, packed, saved, tokens


def documents(pack, tp=1, cp=1, fp8=None):
    config = SimpleNamespace(tensor_model_parallel_size=tp, context_parallel_size=cp, fp8=fp8)
    return Documents(config, pack, QueryPositions.of(pack, 48, "cpu"))


def padded_pack(real, lengths):
    pack = packed(lengths)
    pack.cu_seqlens_q_padded = pack.cu_seqlens_kv_padded = pack.cu_seqlens_q
    pack.cu_seqlens_q = pack.cu_seqlens_kv = packed(real).cu_seqlens_q
    return pack


@pytest.mark.parametrize(
    ("split", "shorter"), [({}, 1), ({"tp": 4}, 4), ({"tp": 2, "cp": 2}, 8), ({"fp8": "e4m3"}, 128)]
)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_lengths_that_may_be_padded_to_a_multiple(split, shorter, twice):
    """Some programs give the padded lengths as both."""
    pack = padded_pack([16, 32], [16, 32]) if twice else packed([16, 32])
    found = documents(pack, **split)
    assert found.lengths == [16, 32]
    assert [found.least(n) for n in (0, 1)] == [16 - shorter, 0]


def test_lengths_that_are_told_are_exact():
    found = documents(padded_pack([13, 32], [16, 32]), tp=4)
    assert found.lengths == [13, 32]
    assert [found.least(n) for n in (0, 1)] == [12, 31]


@pytest.mark.parametrize("length", [5, 30])
def test_a_recompute_of_the_block_is_not_recorded_again(world, tmp_path, length):
    """Also where every key fits, and with the backward inside the block."""
    model = megatron_model(saved(tmp_path), **RECOMPUTE["full"]).train()
    with record_topk() as recorder:
        forward(model, tokens(0, 2, length)).sum().backward()
    assert [one.length for one in recorder.recordings] == [length] * 2
    with record_topk(), pytest.raises(GLM5PatchError, match="runs twice in one record_topk"):
        for seed in (0, 1):
            forward(model, tokens(seed, 2, length))


def test_a_stage_without_a_computing_layer_records_its_documents(world, tmp_path):
    recorder = TopkRecorder()
    found = documents(packed([16, 32]))
    recorder.begin(SimpleNamespace(documents=found), 6, 1)
    assert [(one.length, one.layers) for one in recorder.recordings] == [(16, {}), (32, {})]


def test_a_layer_outside_a_forward_is_told_so(world, tmp_path):
    model = megatron_model(saved(tmp_path))
    attention = model.decoder.layers[0].self_attention
    hidden_states = torch.randn(30, 1, model.config.hidden_size)
    with record_topk(), pytest.raises(GLM5PatchError, match="layer 1: record_topk and replay_topk"):
        attention(hidden_states, None)


def test_layers_of_a_hybrid_schedule_are_numbered_as_a_gpt_models():
    schedule = IndexSchedule.from_types("FNSNFNSN", 8)
    assert schedule.of_attention == IndexSchedule.from_types("FSFS", 4)
    assert [schedule.attention_number(n) for n in schedule.computing_layers] == [1, 3]
