"""Keys are decoded beside the model: by a thread, one layer ahead, each layer once."""

import threading

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.tools.verify import forward
from glm5_patch.topk.ahead import Ahead, Decoded
from glm5_patch.topk.carrier import carried, open_carrier
from glm5_patch.topk.record import LayerName, TopkRecording, record_topk
from glm5_patch.topk.replay import ForwardReplay, replay_topk
from tests.distributed.cases import FULL
from tests.tiny import megatron_model, saved, tokens
from tests.topk.test_record import K, recording

FIRST, SECOND = LayerName(False, 1), LayerName(False, 3)
LENGTH = 30


def decoded(value: int) -> Decoded:
    return Decoded(torch.tensor(value), None, None)


def test_a_thread_decodes_while_the_caller_goes_on():
    may_decode, threads = threading.Event(), []

    def decode(name):
        threads.append(threading.current_thread())
        assert may_decode.wait(30)
        return decoded(name.number)

    ahead = Ahead(decode, torch.device("cpu"))
    ahead.begin(FIRST)
    ahead.begin(FIRST)
    ahead.begin(SECOND)
    assert ahead.begun == (FIRST, SECOND)  # and nothing has been decoded
    may_decode.set()
    assert [ahead.take(name).topk_indices.item() for name in (SECOND, FIRST)] == [3, 1]
    assert len(threads) == 2 and threading.current_thread() not in threads
    assert ahead.begun == ()


def test_what_a_thread_raises_is_raised_where_the_keys_are_used():
    def decode(name):
        raise GLM5PatchError(f"{name} is damaged")

    ahead = Ahead(decode, torch.device("cpu"))
    ahead.begin(FIRST)
    ahead.begin(SECOND)
    with pytest.raises(GLM5PatchError, match="layer 1 is damaged"):
        ahead.take(FIRST)
    ahead.drop()
    assert ahead.begun == ()


class Stack:
    """A replay of two layers of one document, and what has been decoded when."""

    def __init__(self, monkeypatch, made: TopkRecording):
        self.names, decode = [], ForwardReplay._decode

        def noted(replay, name, *args):
            self.names.append(name)
            return decode(replay, name, *args)

        monkeypatch.setattr(ForwardReplay, "_decode", noted)
        self.queries = QueryPositions.of(None, made.length, "cpu")

    def keys(self, replay, name):
        return replay.keys(name, self.queries, 1, K).decoded.topk_indices


@pytest.fixture
def replayed(world, monkeypatch):
    from glm5_patch.topk.documents import Documents
    from glm5_patch.topk.tokens import Layout

    made = recording()
    stack = Stack(monkeypatch, made)
    documents = Documents(None, None, stack.queries)
    layout = Layout(stack.queries, stack.queries, documents=documents)
    with replay_topk([made]), open_carrier() as carrier:
        carrier.replay.check(layout, 1, K, (1, 3))
        carrier.replay.layers = [FIRST, SECOND]
        yield stack, carrier, made


def test_the_next_layer_of_the_stack_is_decoded_ahead(replayed):
    stack, carrier, made = replayed
    for name in (FIRST, SECOND):
        assert torch.equal(stack.keys(carrier.replay, name)[0, K:], made.keys(name.number)[1])
        carried(lambda: None)()  # a checkpoint opens the carrier of its forward again
        assert carrier.replay._ahead.begun == ((SECOND,) if name is FIRST else ())
    assert stack.names == [FIRST, SECOND]


def test_a_recompute_decodes_one_layer_at_a_time_from_the_last(replayed):
    stack, carrier, made = replayed
    replay = carrier.replay
    stack.keys(replay, FIRST)
    replay.end_forward()
    assert replay._ahead.begun == ()
    for name in (SECOND, FIRST):
        assert torch.equal(stack.keys(replay, name)[0, K:], made.keys(name.number)[1])
        assert replay._ahead.begun == ()


@pytest.fixture(scope="module")
def model(world, our_core, tmp_path_factory):
    return megatron_model(saved(tmp_path_factory.mktemp("hf")), **FULL)


def test_a_step_under_full_recompute_decodes_each_layer_once(model, monkeypatch):
    model.train()
    ids, decode, names = tokens(0, 1, LENGTH), ForwardReplay._decode, []
    with torch.no_grad(), record_topk() as recorder:
        forward(model, ids)
    monkeypatch.setattr(
        ForwardReplay, "_decode", lambda *args: names.append(args[1]) or decode(*args)
    )
    with replay_topk(recorder.recordings):
        forward(model, ids).float().logsumexp(-1).mean().backward()
    assert [name.number for name in names] == [1, 2, 3, 7]


def test_damaged_keys_of_a_later_layer_are_an_error_of_the_forward(model):
    ids = tokens(0, 1, LENGTH)
    with torch.no_grad(), record_topk() as recorder:
        forward(model, ids)
    (whole,) = recorder.recordings
    (frame,) = whole.layers[3]
    broken = {**whole.layers, 3: (frame._replace(data=frame.data[:-1]),)}
    damaged = TopkRecording(whole.index_topk, whole.length, broken)
    with pytest.raises(GLM5PatchError, match=r"the data of positions 9 to 29 .* is damaged"):
        with torch.no_grad(), replay_topk([damaged]):
            forward(model, ids)
