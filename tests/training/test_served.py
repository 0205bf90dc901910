"""``dsa_indexer_loss_layers="served"``: an indexer learns from every layer that uses its top-k."""

import functools
import itertools

import pytest
import torch
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossAutoScaler,
    DSAIndexerLossLoggingHelper,
)

from glm5_patch.attention.build import gpt_model
from glm5_patch.attention.hybrid import hybrid_model
from glm5_patch.attention.loss_log import LOSSES
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.index_loss.reference import LossSettings
from glm5_patch.ops.index_loss.served import OverSelectedKeys
from glm5_patch.training.figures import indexer_losses
from glm5_patch.training.phases import set_phase
from tests.ops.test_registry import attention, indexer
from tests.patches.test_recompute import MODES
from tests.tiny import add_mtp_layer, megatron_config, megatron_model, relative, saved
from tests.training.served import (
    COEFFICIENT,
    LAYOUTS,
    expected,
    losses_by_layer,
    microbatch,
)

SERVED = dict(dsa_indexer_loss_coeff=COEFFICIENT, dsa_indexer_loss_layers="served")
SOURCES = (1, 2, 3, 3, 3, 3, 7, 7)
"""Of the 8 layers."""
SEEDS = (0, 9)


@pytest.fixture(autouse=True)
def unscaled():
    scale, DSAIndexerLossAutoScaler.main_loss_backward_scale = (
        DSAIndexerLossAutoScaler.main_loss_backward_scale,
        None,
    )
    yield
    DSAIndexerLossAutoScaler.main_loss_backward_scale = scale


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("served") / "hf")


def by_definition(model, layout, sources, sparse=True):
    """Losses by slot of the log and gradients by name, added up over two microbatches.

    Args:
        model: trained without a loss of the indexers.
        layout: of the microbatches.
        sources: of each forward of an attention, the number of the one whose top-k it uses, from 1.
        sparse: over the selected keys alone.
    """
    losses, gradients = {}, {}
    for seed in SEEDS:
        found = losses_by_layer(model, layout, seed, lambda number: sources[number] - 1, sparse)
        for total, part in zip((losses, gradients), expected(model, found)):
            for name, value in part.items():
                total[name] = total.get(name, 0) + value
    return losses, gradients


@pytest.fixture(scope="module")
def of_decoder(checkpoint):
    return functools.cache(
        lambda layout, sparse: by_definition(megatron_model(checkpoint), layout, SOURCES, sparse)
    )


def assert_equal(found, definition, most=1e-6):
    (gradients, logged), (losses, expected_gradients) = found, definition
    assert logged == pytest.approx(losses, rel=1e-6)
    for name, gradient in expected_gradients.items():
        assert relative(gradients[name].double(), gradient) < most, name


def trained(model, layout):
    """Two microbatches in flight: all gradients, and the logged losses by layer."""
    DSAIndexerLossLoggingHelper.tracker.clear()
    LOSSES.sums = None
    model.train()
    outputs = []
    for seed in SEEDS:
        ids, positions, pack = microbatch(layout, seed)
        outputs.append(model(ids, positions, None, packed_seq_params=pack, labels=ids))
    for output in outputs:
        output.mean().backward()
    logged = DSAIndexerLossLoggingHelper.tracker.pop("values", torch.zeros(0)).tolist()
    logged = {number: loss for number, loss in enumerate(logged, 1) if loss}
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, logged


DEFAULT = {
    (True, "bshd", "none"),
    (True, "thd", "uniform_1"),
    (True, "padded", "core_attn"),
    (False, "bshd", "block_3"),
    (False, "padded", "uniform_1"),
}


@pytest.mark.parametrize(
    ("sparse", "layout", "mode"),
    [
        pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.nightly)
        for case in itertools.product((True, False), LAYOUTS, ("none", *MODES))
    ],
)
def test_gradients_are_the_mean_of_those_of_each_layer(
    checkpoint, of_decoder, sparse, layout, mode
):
    settings = dict(SERVED, dsa_indexer_use_sparse_loss=sparse)
    model = megatron_model(checkpoint, **settings, **MODES.get(mode, {}))
    assert_equal(trained(model, layout), of_decoder(layout, sparse))


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.nightly), "uniform_1"])
def test_indexers_alone_learn_behind_a_frozen_trunk(checkpoint, mode):
    settings = dict(SERVED, dsa_indexer_use_sparse_loss=True)
    model = megatron_model(checkpoint, **settings, **MODES.get(mode, {}))
    set_phase(model, "indexer_warmup")
    found = trained(model, "thd")
    assert_equal(found, by_definition(model, "thd", SOURCES))
    assert all(".indexer." in name for name in found[0])


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.nightly), "uniform_1"])
def test_frozen_indexers_log_their_loss(checkpoint, of_decoder, mode):
    settings = dict(SERVED, dsa_indexer_use_sparse_loss=True)
    model = megatron_model(checkpoint, **settings, **MODES.get(mode, {}))
    set_phase(model, "frozen_indexer")
    gradients, logged = trained(model, "thd")
    assert logged == pytest.approx(of_decoder("thd", True)[0], rel=1e-6)
    assert not any(".indexer." in name for name in gradients)


@pytest.fixture(scope="module")
def mtp_checkpoint(world, tmp_path_factory):
    directory = saved(tmp_path_factory.mktemp("served_mtp") / "hf").directory
    add_mtp_layer(directory)
    return HFCheckpoint(directory)


@pytest.mark.parametrize(
    ("sparse", "mode"),
    [
        (True, "uniform_1"),
        pytest.param(True, "none", marks=pytest.mark.nightly),
        pytest.param(False, "uniform_1", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("shares", [True, False])
def test_a_layer_of_multi_token_prediction_has_its_own_slot(mtp_checkpoint, shares, sparse, mode):
    """Where its iterations share one top-k, its indexer learns from all of them."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings, sources = dict(mtp_num_layers=1), (*SOURCES, 9)
    if shares:
        if not hasattr(TransformerConfig, "mtp_use_repeated_layer"):
            pytest.skip("this megatron-core applies each MTP layer once")
        settings = dict(
            mtp_num_layers=3,
            mtp_use_repeated_layer=True,
            dsa_indexer_share_for_mtp_iteration=True,
        )
        sources = (*SOURCES, 9, 9, 9)
    definition = by_definition(megatron_model(mtp_checkpoint, **settings), "bshd", sources, sparse)
    assert 9 in definition[0]
    settings.update(SERVED, dsa_indexer_use_sparse_loss=sparse, **MODES.get(mode, {}))
    # What MTP layers project is larger than elsewhere, and rounds more.
    assert_equal(trained(megatron_model(mtp_checkpoint, **settings), "bshd"), definition, 2e-6)


def test_a_layer_that_adds_nothing_is_told_of(checkpoint):
    model = megatron_model(checkpoint, **SERVED).train()
    model.decoder.layers[4].self_attention.core_attention.eval()
    ids, positions, _ = microbatch("bshd", 0)
    loss = model(ids, positions, None, labels=ids).mean()
    with pytest.raises(GLM5PatchError, match="3 of the 4 layers.*dsa_indexer_loss_layers='source'"):
        loss.backward()


def test_another_value_is_refused(checkpoint):
    with pytest.raises(GLM5PatchError, match="'all' must be one of source, served"):
        megatron_model(checkpoint, dsa_indexer_loss_layers="all")


def test_the_trunk_learns_nothing_from_it(checkpoint):
    (alone, _), (served, _) = (
        trained(megatron_model(checkpoint, **settings), "bshd") for settings in ({}, SERVED)
    )
    assert all(torch.equal(served[name], gradient) for name, gradient in alone.items())


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.nightly), "uniform_1"])
def test_a_hybrid_model_learns_the_same(checkpoint, mode):
    """Its layers are numbered across kinds."""
    pytest.importorskip("megatron.core.models.hybrid.hybrid_model")
    found = []
    for hybrid in (False, True):
        settings = dict(SERVED, dsa_indexer_use_sparse_loss=True, hybrid=hybrid)
        config = megatron_config(checkpoint.config, **settings, **MODES.get(mode, {}))
        model = (hybrid_model if hybrid else gpt_model)(checkpoint.config, config)
        checkpoint.load_into(model)
        gradients, logged = trained(model, "thd")
        indexers = [gradient for name, gradient in gradients.items() if ".indexer." in name]
        found.append((indexers, list(logged.values()), list(indexer_losses())))
    (indexers, logged, names), (others, also_logged, same_names) = found
    assert len(indexers) == len(others) == 20
    assert max(relative(a, b) for a, b in zip(others, indexers)) < 1e-6
    assert also_logged == pytest.approx(logged, rel=1e-6)
    assert names == same_names == [f"glm5/indexer_loss/layer_0{n}" for n in (1, 2, 3, 7)]


def test_the_layers_of_a_topk_keep_one_tensor_of_its_size():
    generator = torch.Generator().manual_seed(0)
    found = OverSelectedKeys(4)
    inputs, settings = indexer(generator), LossSettings(0.2, 0.3, sparse=True)
    found.begin(inputs, settings)

    def held():
        return [t for t in vars(found).values() if isinstance(t, torch.Tensor) and t.dim()]

    shape = None
    for user in range(4):
        attended = attention(generator)
        shape = attended.topk_indices.shape
        found.add(user, attended, None)
        found.add(user, attended, None)  # of a recompute
        assert [(tensor.shape, tensor.dtype) for tensor in held()] == [(shape, torch.float32)]
    assert held()[0].sum(-1).allclose(torch.ones(shape[:2]))
    found.take(inputs, settings)
    assert not held()
    with pytest.raises(GLM5PatchError, match="or that went backward twice"):
        found.take(inputs, settings)
