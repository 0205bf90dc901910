"""Which parameters train in each phase, and that the audit says so."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.tools.verify import forward
from glm5_patch.training.phases import audit, set_phase
from tests.tiny import loss_of, megatron_model, saved, tokens


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
    return {"indexer_warmup": of_indexer, "joint": True, "frozen_indexer": not of_indexer}[phase]


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
        GLM5PatchError, match="'warmup' must be one of indexer_warmup, joint, frozen"
    ):
        set_phase(model, "warmup")
    with pytest.raises(GLM5PatchError, match="dsa_indexer_loss_coeff is None; set it"):
        set_phase(model, "joint")
    assert all(p.requires_grad for p in model.parameters())
