"""Figures of the indexers against their definition, and where they are written."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerLossLoggingHelper,
)

from glm5_patch.attention.loss_log import LOSSES
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import GLM5PatchError
from glm5_patch.testing.parity import recorded, topk_overlap
from glm5_patch.tools.verify import forward
from glm5_patch.training.figures import IndexerCallback, SelectionProbe, indexer_losses
from tests.ops import dense
from tests.patches.test_recompute import MODES
from tests.tiny import add_mtp_layer, megatron_model, saved, tokens
from tests.training.served import watched

COMPUTING = ("layer_01", "layer_02", "layer_03", "layer_07")
LOSS = dict(dsa_indexer_loss_coeff=0.1)


class Writer:
    """A TensorBoard writer, and a wandb run."""

    def __init__(self):
        self.scalars, self.logged = {}, []

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = float(value)

    def log(self, figures, step):
        self.logged.append((dict(figures), step))


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    directory = saved(tmp_path_factory.mktemp("figures") / "hf").directory
    add_mtp_layer(directory)
    return HFCheckpoint(directory)


@pytest.fixture(autouse=True)
def nothing_logged_before():
    LOSSES.sums = None
    DSAIndexerLossLoggingHelper.tracker.clear()


def train(model, *seeds):
    """One step of some microbatches."""
    for seed in seeds:
        ids = tokens(seed, 2, 40)
        model.train()(ids, torch.arange(40).expand_as(ids), None, labels=ids).mean().backward()


@pytest.mark.parametrize(
    ("mode", "per_token"),
    [
        ("none", False),
        ("uniform_1", True),
        pytest.param("none", True, marks=pytest.mark.nightly),
        pytest.param("uniform_1", False, marks=pytest.mark.nightly),
    ],
)
def test_losses_are_means_over_the_microbatches(checkpoint, mode, per_token):
    settings = dict(LOSS, mtp_num_layers=1, calculate_per_token_loss=per_token)
    model = megatron_model(checkpoint, **settings, **MODES.get(mode, {}))
    each = []
    for seed in (0, 1):
        train(model, seed)
        each.append(indexer_losses())
    assert list(each[0]) == [f"glm5/indexer_loss/{name}" for name in (*COMPUTING, "mtp_1")]
    assert each[0] != each[1] and min(each[0].values()) > 0
    assert indexer_losses() == {}
    train(model, 0, 1)
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    assert indexer_losses() == pytest.approx(mean, rel=1e-6)


def test_the_hosts_loggers_get_each_layer(checkpoint):
    model = megatron_model(checkpoint, **LOSS)
    train(model, 0)
    expected = indexer_losses()
    train(model, 0, 0)
    writer, run, printed = Writer(), Writer(), {}
    DSAIndexerLossLoggingHelper.track_indexer_metrics(0.5, 7, writer, run, printed)
    mean = float(printed["indexer loss"])
    assert mean == pytest.approx(sum(expected.values()) * 3 * 0.5 / 8, rel=1e-5)
    assert writer.scalars == pytest.approx(
        {(name, 7): value for name, value in {**expected, "indexer loss": mean}.items()}, rel=1e-5
    )
    assert [step for _, step in run.logged] == [7, 7]
    assert run.logged[1][0] == pytest.approx(expected, rel=1e-5)
    DSAIndexerLossLoggingHelper.track_indexer_metrics(1.0, 8, None)  # of a rank without a logger
    assert indexer_losses() == {}


def test_megatron_bridge_calls_it_after_a_step(checkpoint):
    model = megatron_model(checkpoint, **LOSS)
    ids = tokens(0, 2, 40)
    probe = SelectionProbe(model, lambda: forward(model, ids))
    callback, writer = IndexerCallback(probe, probe_interval=2), Writer()
    for step in (0, 1):
        train(model, step)
        state = SimpleNamespace(
            train_state=SimpleNamespace(step=step), tensorboard_logger=writer, wandb_logger=None
        )
        callback.on_train_step_end(SimpleNamespace(state=state))
    assert ("glm5/indexer_loss/layer_07", 1) in writer.scalars
    assert {step for name, step in writer.scalars if "attention_kept" in name} == {2}
    with pytest.raises(ValueError, match="probe_interval=0"):
        IndexerCallback(probe, probe_interval=0)


def by_definition(model, ids):
    """Kept attention and oracle gap of each layer, with everything in memory."""
    kept, gap = {}, {}
    with torch.no_grad(), watched(model) as (seen, topk):
        forward(model.eval(), ids)
    for number, ((core, (query, latent, up, _, _)), chosen) in enumerate(zip(seen, topk), 1):
        mask = dense.visible([ids.shape[1]]).expand(len(ids), -1, -1)
        key, _ = dense.keys_and_values(latent, up, core.dims.nope, core.dims.value)
        probs = dense.probabilities(query, key, mask, core.softmax_scale).mean(1)  # [b, s, t]
        held = (probs * dense.selected(chosen, [ids.shape[1]])).sum(-1)
        most = probs.sort(-1, descending=True)[0][..., : chosen.shape[-1]].sum(-1)
        kept[f"glm5/attention_kept/layer_{number:02d}"] = held.mean().item()
        gap[f"glm5/oracle_gap/layer_{number:02d}"] = (most - held).mean().item()
    return {**kept, **gap}


def test_a_probe_measures_its_batch(checkpoint):
    model = megatron_model(checkpoint, **LOSS)
    ids = tokens(3, 2, 40)
    probe = SelectionProbe(model, lambda: forward(model, ids))
    assert probe.measure() == pytest.approx(by_definition(model, ids), rel=1e-4, abs=1e-6)
    with torch.no_grad(), recorded(model) as before:
        forward(model, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter += 0.05 * torch.randn_like(parameter)
    found = probe.measure()
    with torch.no_grad(), recorded(model) as now:
        forward(model, ids)
    overlaps = topk_overlap(now.topk_indices, before.topk_indices)
    for number in (1, 2, 3, 7):
        share = found.pop(f"glm5/topk_overlap/layer_{number:02d}")
        assert share == pytest.approx(overlaps[number]) and 0.1 < share < 1
    assert found == pytest.approx(by_definition(model, ids), rel=1e-4, abs=1e-6)


def test_a_probe_leaves_the_model_as_it_was(checkpoint):
    model = megatron_model(checkpoint, **LOSS).train()
    model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    probe = SelectionProbe([model], lambda: forward(model, tokens(3, 2, 40)))
    probe.measure()
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert indexer_losses() == {}
    probe._forward = lambda: forward(model, tokens(3, 2, 41))
    with pytest.raises(GLM5PatchError, match="the batch is not that of the first measurement"):
        probe.measure()
    with pytest.raises(GLM5PatchError, match="GLM5_PATCH_ATTENTION=plugin"):
        other = torch.nn.Linear(1, 1)
        other.config = model.config
        SelectionProbe(other, lambda: None).measure()
