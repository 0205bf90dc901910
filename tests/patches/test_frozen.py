"""Gradients of what trains beside frozen parameters, under every recompute."""

import functools

import pytest
import torch

from glm5_patch.training.phases import set_phase
from tests.patches.test_recompute import MODES, assert_equal, gradients, microbatches
from tests.tiny import megatron_model, saved

MORE_MODES = {
    **MODES,
    "moe": dict(recompute_granularity="selective", recompute_modules=["moe"]),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "several": dict(
        recompute_granularity="selective",
        recompute_modules=["core_attn", "mla_up_proj", "layernorm", "moe"],
    ),
}


class Adapter(torch.nn.Module):
    """A linear layer of the host with a trainable product of two small matrices beside it."""

    def __init__(self, base: torch.nn.Module, seed: int):
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape
        generator = torch.Generator().manual_seed(seed)
        self.lora_a = torch.nn.Parameter(torch.randn(4, columns, generator=generator) * 0.1)
        self.lora_b = torch.nn.Parameter(torch.randn(rows, 4, generator=generator) * 0.1)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x, *args, **kwargs):
        output, bias = self.base(x, *args, **kwargs)
        return output + x @ self.lora_a.T @ self.lora_b.T, bias


def freeze_trunk(model):
    set_phase(model, "indexer_warmup")


def freeze_embedding(model):
    model.embedding.requires_grad_(False)


def freeze_up_projections(model):
    for name, parameter in model.named_parameters():
        if "_up_proj." in name:
            parameter.requires_grad_(False)


def adapt(model, *names):
    """Freeze all, then put adapters on the modules of these names."""
    model.requires_grad_(False)
    found = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in names]
    assert found
    for seed, name in enumerate(found):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Adapter(getattr(owner, child), seed))


FROZEN = {
    "trunk": freeze_trunk,
    "embedding": freeze_embedding,
    "up_projections": freeze_up_projections,
    "adapters": lambda model: adapt(
        model, "linear_q_down_proj", "linear_kv_up_proj", "linear_proj", "linear_wq_b"
    ),
    "adapters_of_the_output": lambda model: adapt(model, "linear_proj"),
}


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("frozen") / "hf"
    return saved(directory, num_hidden_layers=8)


def gradients_of(checkpoint, frozen, layout, **settings):
    model = megatron_model(checkpoint, dsa_indexer_loss_coeff=0.1, **settings)
    FROZEN[frozen](model)
    found = gradients(model, microbatches(layout, 0))
    return model, found


@pytest.fixture(scope="module")
def gradients_without_recompute(checkpoint):
    return functools.cache(lambda frozen, layout: gradients_of(checkpoint, frozen, layout))


@pytest.mark.parametrize("layout", ["bshd", "thd"])
@pytest.mark.parametrize("mode", MORE_MODES)
@pytest.mark.parametrize("frozen", FROZEN)
def test_recompute_trains_what_is_trainable(
    checkpoint, gradients_without_recompute, frozen, mode, layout
):
    _, plain = gradients_without_recompute(frozen, layout)
    assert plain
    _, found = gradients_of(checkpoint, frozen, layout, **MORE_MODES[mode])
    assert_equal(found, plain)


@pytest.mark.parametrize("frozen", FROZEN)
def test_without_recompute_nothing_trainable_lacks_a_gradient(
    checkpoint, gradients_without_recompute, frozen
):
    model, plain = gradients_without_recompute(frozen, "bshd")
    unused = ".experts."  # an expert that no token chose
    trains = {n for n, p in model.named_parameters() if p.requires_grad and unused not in n}
    assert trains <= plain.keys()
