"""Which parameters train in each phase, and that the audit says so."""

import copy

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from glm5_patch.config.fields import PHASES
from glm5_patch.errors import GLM5PatchError
from glm5_patch.testing.cpu_host import CudaLiterals
from glm5_patch.tools.verify import forward
from glm5_patch.topk.record import record_topk
from glm5_patch.training.phases import audit, set_phase
from tests.patches.test_recompute import MODES
from tests.tiny import loss_of, megatron_config, megatron_model, saved, tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("trainable"))


@pytest.fixture
def model(world, checkpoint):
    return megatron_model(checkpoint, dsa_indexer_loss_coeff=0.1)


class Adapted(torch.nn.Module):
    """A linear layer under an adapter, with Megatron-Bridge's names."""

    def __init__(self, linear):
        super().__init__()
        self.to_wrap = linear
        self.adapter = torch.nn.Linear(4, 4, bias=False)


def trained_in(phase: str, name: str) -> bool:
    """Whether a phase trains a parameter of this name; the router's bias has no gradient."""
    of_indexer = ".core_attention.indexer." in name
    warmups = dict.fromkeys(("dense_warmup", "indexer_warmup"), of_indexer)
    return {**warmups, "joint": True, "frozen_indexer": not of_indexer}[phase]


def moved(model) -> set[str]:
    """Names of the parameters that one step changes."""
    ids = tokens(0, 8, 48)  # so many that every expert gets one
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    loss_of(forward(model.train(), ids), ids).backward()
    optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize(
    "phase, kinds",
    [
        ("dense_warmup", {"indexer"}),
        ("indexer_warmup", {"indexer"}),
        ("joint", {"indexer", "latent", "experts", "rest"}),
        ("frozen_indexer", {"latent", "experts", "rest"}),
    ],
)
def test_a_step_moves_what_the_phase_trains(model, phase, kinds):
    shares = set_phase(model, phase)
    assert {share.kind for share in shares if share.trainable} == kinds
    assert all(not (share.trainable and share.frozen) for share in shares)
    expected = {name for name, _ in model.named_parameters() if trained_in(phase, name)}
    assert moved(model) == expected


def test_the_audit_counts_every_number_once(model):
    assert sum(s.trainable + s.frozen for s in audit([model])) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize(
    "phase, trains",
    [
        ("indexer_warmup", {"indexer": 9, "adapters": 0}),
        ("joint", {"indexer": 9, "adapters": 16}),
        ("frozen_indexer", {"indexer": 0, "adapters": 16}),
    ],
)
def test_under_adapters_the_base_stays_frozen(phase, trains):
    model = torch.nn.Module()
    model.config = type("Config", (), {"dsa_indexer_loss_coeff": 0.1})()
    model.self_attention = torch.nn.Module()
    model.self_attention.linear_proj = Adapted(torch.nn.Linear(4, 4))
    model.self_attention.core_attention = torch.nn.Module()
    model.self_attention.core_attention.indexer = torch.nn.Linear(3, 3, bias=False)
    shares = {share.kind: share.trainable for share in set_phase([model, torch.nn.Module()], phase)}
    assert {kind: shares.get(kind, 0) for kind in trains} == trains
    assert model.self_attention.linear_proj.to_wrap.weight.requires_grad is False


def test_bad_phases_are_named(world, checkpoint):
    model = megatron_model(checkpoint)
    with pytest.raises(
        GLM5PatchError, match="phase='warmup' must be one of dense_warmup, indexer_warmup, joint"
    ):
        set_phase(model, "warmup")
    with pytest.raises(GLM5PatchError, match="dsa_indexer_loss_coeff is None; set it"):
        set_phase(model, "joint")
    assert all(p.requires_grad for p in model.parameters())


EVERY_KEY = 64
"""More than a sequence has."""


def gradients_of(model):
    """Loss and gradients of two microbatches in flight."""
    model.train()
    losses = [loss_of(forward(model, ids), ids) for ids in (tokens(0, 2, 48), tokens(1, 2, 40))]
    for loss in losses:
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(losses).item(), found


@pytest.mark.parametrize(
    ("layers", "mode"),
    [
        ("source", "none"),
        ("served", "uniform_1"),
        pytest.param("source", "uniform_1", marks=pytest.mark.nightly),
        pytest.param("served", "none", marks=pytest.mark.nightly),
        pytest.param("served", "core_attn", marks=pytest.mark.nightly),
    ],
)
def test_a_dense_warmup_attends_to_every_key(world, checkpoint, mode, layers):
    """As a model whose top-k holds every key, and whose indexers learn from all of them."""
    settings = dict(
        dsa_indexer_loss_coeff=0.1, dsa_indexer_loss_layers=layers, **MODES.get(mode, {})
    )
    # The selected keys are not what the loss is over, whatever this says.
    warming = megatron_model(checkpoint, **settings, dsa_indexer_use_sparse_loss=True)
    set_phase(warming, "dense_warmup")
    loss, found = gradients_of(warming)
    dense = megatron_model(checkpoint, **settings, dsa_indexer_topk=EVERY_KEY)
    set_phase(dense, "indexer_warmup")
    expected_loss, expected = gradients_of(dense)
    assert loss == expected_loss
    assert found.keys() == expected.keys() and all(".indexer." in name for name in found)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    sparse = megatron_model(checkpoint, **settings)
    set_phase(sparse, "indexer_warmup")
    assert gradients_of(sparse)[0] != loss


def test_the_phase_after_a_dense_warmup_is_sparse_again(model):
    plain = gradients_of(model)
    for phase in ("dense_warmup", "joint"):
        set_phase(model, phase)
        model.zero_grad()
        loss, found = gradients_of(model)
        assert (loss == plain[0]) == (phase == "joint")
    assert all(torch.equal(found[name], gradient) for name, gradient in plain[1].items())


def test_a_dense_warmup_records_and_replays_nothing(model):
    set_phase(model, "dense_warmup")
    with pytest.raises(GLM5PatchError, match="selects no keys to record"), record_topk():
        forward(model, tokens(0, 1, 40))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(dsa_training_phase="joint"), "dsa_training_phase='joint' trains the indexers, which"),
        (dict(dsa_training_phase="warm"), "dsa_training_phase='warm' must be one of dense_warmup"),
        (
            dict(dsa_training_phase="dense_warmup", dsa_topk_replay=True, dsa_indexer_loss_coeff=1),
            "dsa_topk_replay=True with dsa_training_phase='dense_warmup'",
        ),
    ],
)
def test_a_configuration_of_no_phase_is_refused(checkpoint, fields, says):
    with pytest.raises(GLM5PatchError, match=says):
        megatron_config(checkpoint.config, **fields)


class Run:
    """Training by the host's own wrapper and optimizer, which a flag has given a phase."""

    def __init__(self, checkpoint, phase):
        settings = dict(dsa_indexer_loss_coeff=0.1, dsa_training_phase=phase)
        self.model = megatron_model(checkpoint, **settings)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        self.wrapped = DistributedDataParallel(self.model.config, ddp_config, self.model)
        config = OptimizerConfig(
            optimizer="adam", lr=1e-3, weight_decay=0.1, params_dtype=torch.float32
        )
        self.optimizer = get_megatron_optimizer(config, [self.wrapped])

    def train(self, *steps):
        self.wrapped.train()
        for step in steps:
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            ids = tokens(step, 2, 40)
            loss_of(forward(self.wrapped, ids), ids).backward()
            finalize_model_grads([self.wrapped])
            self.optimizer.step()
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def expert_biases(self):
        """What balances the experts: no parameter, and of the trunk."""
        named = self.model.named_buffers()
        return torch.cat([buffer for name, buffer in named if name.endswith("expert_bias")])

    def saved(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))


@pytest.mark.parametrize(
    "phase",
    ["dense_warmup", "joint"]
    + [pytest.param(n, marks=pytest.mark.nightly) for n in ("indexer_warmup", "frozen_indexer")],
)
def test_a_resumed_run_is_an_uninterrupted_one(world, checkpoint, phase):
    with CudaLiterals():
        start = Run(checkpoint, phase)
        before = start.train(0, 1)
        weights, optimizer = start.saved()
        uninterrupted = start.train(2, 3)
        resumed = Run(checkpoint, phase)
        resumed.model.load_state_dict(weights)
        resumed.optimizer.load_state_dict(optimizer)
        again = resumed.train(2, 3)
    assert all(torch.equal(again[name], value) for name, value in uninterrupted.items())
    for name, value in uninterrupted.items():
        if ".experts." not in name:  # no token may have chosen it
            assert torch.equal(value, before[name]) != trained_in(phase, name), name


@pytest.mark.parametrize(
    ("phase", "following"),
    [
        ("dense_warmup", "joint"),
        *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in zip(PHASES, PHASES[1:])),
    ],
)
def test_the_next_phase_starts_from_the_weights(world, checkpoint, phase, following):
    """Megatron-LM's ``--no-load-optim``: the optimizer has other parameters now."""
    with CudaLiterals():
        first = Run(checkpoint, phase)
        before = first.train(0, 1)
        resumed = Run(checkpoint, following)
        resumed.model.load_state_dict(first.saved()[0])
        after = resumed.train(2)
    for name, value in after.items():
        if ".experts." not in name:
            assert torch.equal(value, before[name]) != trained_in(following, name), name


def test_a_frozen_trunk_keeps_its_routing(world, checkpoint):
    with CudaLiterals():
        run = Run(checkpoint, "dense_warmup")
        before = run.expert_biases().clone()
        run.train(0)
        assert torch.equal(run.expert_biases(), before)
        set_phase(run.model, "indexer_warmup")
        run.train(1)
        assert torch.equal(run.expert_biases(), before)
        rate = megatron_config(checkpoint.config).moe_router_bias_update_rate
        set_phase(run.model, "joint")
        assert run.model.config.moe_router_bias_update_rate == rate > 0
        run.train(2)
        assert not torch.equal(run.expert_biases(), before)
