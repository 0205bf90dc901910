"""Trainable indexers without a loss are told of, once."""

import weakref

import pytest

from glm5_patch.patches import announce
from glm5_patch.tools.verify import forward
from tests.patches.test_frozen import adapt
from tests.tiny import megatron_model, saved, tokens


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("untrained") / "hf")


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(announce, "_untrained_announced", False)
    monkeypatch.setattr(announce, "_asked_for_untrained", weakref.WeakSet())
    monkeypatch.setattr(announce, "announce", lambda *_: None)
    monkeypatch.setattr(announce, "say", found.append)
    return found


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda model: None, "the indexers are trainable but get no gradient"),
        (lambda model: adapt(model, "linear_wq_b"), "adapters on indexers are trainable but get"),
    ],
    ids=["whole", "adapters"],
)
def test_trainable_indexers_without_a_loss_are_told_of_once(checkpoint, lines, prepare, says):
    model = megatron_model(checkpoint)
    prepare(model)
    forward(model.eval(), tokens(0, 1, 16))
    assert not lines
    for _ in range(2):
        forward(model.train(), tokens(0, 1, 16))
    assert len(lines) == 1
    assert says in lines[0]
    assert "dsa_indexer_loss_coeff is None" in lines[0]


@pytest.mark.parametrize(
    ("prepare", "settings"),
    [
        (lambda model: None, {"dsa_indexer_loss_coeff": 0.1}),
        (lambda model: adapt(model, "linear_proj"), {}),
    ],
    ids=["a loss", "frozen"],
)
def test_nothing_is_said_where_nothing_is_lost(checkpoint, lines, prepare, settings):
    model = megatron_model(checkpoint, **settings)
    prepare(model)
    forward(model.train(), tokens(0, 1, 16))
    assert not lines
