"""Two microbatches in flight (forward, forward, backward, backward) under every recompute."""

import functools
import gc
import inspect
import weakref

import pytest
import torch

import glm5_patch
from glm5_patch.errors import GLM5PatchError
from glm5_patch.tools.verify import forward
from tests.tiny import loss_of, megatron_model, pack_forward, packed, relative, saved, tokens

FULL = dict(recompute_granularity="full")
MODES = {
    "uniform_1": dict(FULL, recompute_method="uniform", recompute_num_layers=1),
    "uniform_4": dict(FULL, recompute_method="uniform", recompute_num_layers=4),
    "block_3": dict(FULL, recompute_method="block", recompute_num_layers=3),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "mla_up_proj": dict(recompute_granularity="selective", recompute_modules=["mla_up_proj"]),
    "layernorm": dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
}


def masked_forward(model, ids):
    """With the causal mask as a tensor, as Megatron's data loaders make it: True is invisible."""
    s = ids.shape[1]
    mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    return model(ids, torch.arange(s).expand_as(ids), mask)


def microbatches(layout, seed):
    """Two losses of different data, and of different length where the layout allows it."""
    first, second = tokens(seed, 2, 48), tokens(seed + 9, 2, 40)
    pack_a, pack_b = tokens(seed, 1, 60), tokens(seed + 9, 1, 48)
    reused = packed([1, 20, 39])
    calls = {
        "bshd": [(forward, first), (forward, second)],
        "mask": [(masked_forward, first), (masked_forward, second)],
        "thd": [
            (pack_forward, pack_a, packed([1, 20, 39])),
            (pack_forward, pack_b, packed([48])),
        ],
        "reused": [
            (pack_forward, pack_a, reused),
            (pack_forward, tokens(seed + 9, 1, 60), reused),
        ],
    }[layout]
    return [lambda m, c=call: loss_of(c[0](m, *c[1:]), c[1]) for call in calls]


def gradients(model, losses):
    model.train()
    model.zero_grad()
    graphs = [loss(model) for loss in losses]
    for graph in graphs:
        graph.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, recompute):
    """On the CPU a recompute repeats every operation, so bit for bit; but where it is that of the
    norms, autograd adds up the gradients of a norm's readers in another order."""
    assert ours.keys() == theirs.keys()
    if "layernorm" in recompute.get("recompute_modules", ()):
        assert max(relative(ours[n], g) for n, g in theirs.items() if g.any()) <= 3e-6
        assert [n for n, g in theirs.items() if not g.any() and ours[n].any()] == []
    else:
        assert [n for n, g in theirs.items() if not torch.equal(ours[n], g)] == []


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("recompute") / "hf")


@pytest.fixture(scope="module")
def gradients_without_recompute(checkpoint):
    @functools.cache
    def of(layout, coefficient, seed):
        model = megatron_model(checkpoint, dsa_indexer_loss_coeff=coefficient)
        return gradients(model, microbatches(layout, seed))

    return of


@pytest.mark.parametrize(
    ("layout", "coefficient"),
    [
        ("bshd", 0.1),
        ("thd", 0.1),
        ("mask", None),
        ("reused", None),
        pytest.param("bshd", None, marks=pytest.mark.nightly),
        pytest.param("thd", None, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_without_recompute(
    checkpoint, gradients_without_recompute, mode, layout, coefficient
):
    for seed in (0, 1):
        plain = gradients_without_recompute(layout, coefficient, seed)
        model = megatron_model(checkpoint, dsa_indexer_loss_coeff=coefficient, **MODES[mode])
        assert_equal(gradients(model, microbatches(layout, seed)), plain, MODES[mode])


def test_a_pack_equals_its_documents_one_by_one(our_core, checkpoint, lower_position_first):
    model = megatron_model(checkpoint).eval()
    lengths = [1, 20, 39, 12]
    ids = tokens(3, 1, sum(lengths))
    with torch.no_grad():
        whole = pack_forward(model, ids, packed(lengths))
        parts = [forward(model, part) for part in ids.split(lengths, dim=1)]
    assert (whole - torch.cat(parts, dim=1)).abs().max() < 2e-5


def test_a_recompute_selects_nothing_again(our_core, checkpoint, monkeypatch):
    from glm5_patch.attention.indexer import LightningIndexer

    calls = []
    select = LightningIndexer.select
    monkeypatch.setattr(LightningIndexer, "select", lambda *a: calls.append(1) or select(*a))
    gradients(megatron_model(checkpoint, **MODES["uniform_1"]), microbatches("bshd", 0))
    assert len(calls) == 2 * 4  # two microbatches, four computing layers, forward passes only


def test_without_the_checkpoint_patch_a_recompute_is_refused(checkpoint, monkeypatch):
    model = megatron_model(checkpoint, **MODES["uniform_1"]).train()
    monkeypatch.setenv("GLM5_PATCH_DISABLE", "checkpoint_recompute")
    glm5_patch.disable()
    try:
        glm5_patch.enable()
        with pytest.raises(GLM5PatchError, match="recompute_granularity=None, now 'full'"):
            forward(model, tokens(0, 1, 32))
        model.config.recompute_granularity = None
        forward(model, tokens(0, 1, 32))
    finally:
        monkeypatch.delenv("GLM5_PATCH_DISABLE")
        glm5_patch.enable()
    assert glm5_patch.status()["checkpoint_recompute"].state == "applied"


@pytest.mark.parametrize("puts_it_back", [True, False])
def test_another_s_checkpoint_counts_where_it_puts_the_carrier_back(
    world, monkeypatch, puts_it_back
):
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from glm5_patch.topk.carrier import carried

    host = inspect.unwrap(CheckpointFunction.forward)

    def replaced(ctx, run_function, *rest):
        return host(ctx, carried(run_function) if puts_it_back else run_function, *rest)

    monkeypatch.setattr(CheckpointFunction, "forward", staticmethod(replaced))
    row = glm5_patch.status()["checkpoint_recompute"]
    if puts_it_back:
        assert row.state == "not_needed", row.reason
    else:
        assert row.state == "failed"
        assert "a recompute by checkpoint does not see its own forward's top-k" in row.reason
    monkeypatch.undo()
    assert glm5_patch.status()["checkpoint_recompute"].state == "applied"


def test_padding_inside_a_pack_changes_nothing(our_core, checkpoint, lower_position_first):
    model = megatron_model(checkpoint).eval()
    lengths, padded = [1, 19, 30], [4, 20, 32]
    pack = packed(padded)
    pack.cu_seqlens_q = pack.cu_seqlens_kv = packed(lengths).cu_seqlens_q
    pack.cu_seqlens_q_padded = pack.cu_seqlens_kv_padded = packed(padded).cu_seqlens_q
    ids = tokens(4, 1, sum(padded))
    positions = torch.cat([torch.arange(n) for n in padded])[None]
    with torch.no_grad():
        whole = model(ids, positions, None, packed_seq_params=pack)
        for document, logits, n in zip(ids.split(padded, 1), whole.split(padded, 1), lengths):
            alone = forward(model, document[:, :n])
            assert (logits[:, :n] - alone).abs().max() < 2e-5


def test_topk_is_freed_after_its_last_reader_or_with_its_graph(our_core, checkpoint, monkeypatch):
    from glm5_patch.topk.carrier import TopkCarrier

    held, carriers = [], []
    publish = TopkCarrier.publish

    def watched(carrier, *args):
        publish(carrier, *args)
        held.append(len(carrier.held_layers))
        carriers.append(weakref.ref(carrier))

    monkeypatch.setattr(TopkCarrier, "publish", watched)
    ids = tokens(0, 1, 40)
    forward(megatron_model(checkpoint).train(), ids)
    assert max(held) == 1  # layers 1 and 2 have no readers, those of 3 are through before 7
    held.clear(), carriers.clear()
    loss = loss_of(forward(megatron_model(checkpoint, **MODES["uniform_1"]).train(), ids), ids)
    assert max(held) == 4  # the recompute of each computing layer will ask for its own
    loss.backward()
    del loss
    gc.collect()
    assert not any(carrier() for carrier in carriers)
