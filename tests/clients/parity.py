"""A GLM-5 as a client builds it, against Hugging Face and against itself without recompute."""

from __future__ import annotations

import torch

import glm5_patch
from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.tools.verify import forward
from tests.patches.test_parity import assert_gradients, compared
from tests.patches.test_recompute import FULL, gradients, microbatches
from tests.tiny import hf_config, hf_model, pack_forward, packed, relative, tokens

LENGTHS = (1, 20, 39)
RECOMPUTE = dict(FULL, recompute_method="uniform", recompute_num_layers=1)


def loaded(model, checkpoint: HFCheckpoint):
    """A client's model, with the weights of a checkpoint and the latent norms of Hugging Face."""
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
    checkpoint.load_into(model)
    glm5_patch.require(model=model)
    return model


def assert_equals_hugging_face(build, directory, seed: int) -> None:
    """Logits to 2e-5, padded and packed, and gradients to 1e-5.

    Args:
        build: makes the model of an ``HFCheckpoint`` and loads it.
        directory: where the checkpoint is written.
        seed: of the weights and the tokens.
    """
    theirs = hf_model(hf_config(), seed)
    theirs.save_pretrained(directory)
    ours = build(HFCheckpoint(directory))
    ids, _ = compared(ours, theirs, lambda draw: tokens(seed + 100 * draw, 2, 64))
    assert_gradients(ours, theirs, ids)
    for length in LENGTHS:
        compared(ours, theirs, lambda draw, n=length: tokens(seed + n + 100 * draw, 1, n))
    assert_packs(ours, tokens(seed, 1, sum(LENGTHS)))


def assert_packs(model, ids) -> None:
    """A pack of documents has the logits of each of them alone."""
    # Equal scores fall alike in rows of different length only in a fixed order.
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            whole = pack_forward(model, ids, packed(LENGTHS))
            parts = [forward(model, part) for part in ids.split(LENGTHS, dim=1)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert (whole - torch.cat(parts, dim=1)).abs().max() <= 2e-5


def assert_recomputes(build, directory, seed: int, recompute=RECOMPUTE) -> None:
    """With two microbatches in flight the gradients are those of no recompute, to 1e-6.

    Args:
        build: as above; it takes fields of the configuration as well.
        directory: where ``assert_equals_hugging_face`` wrote the checkpoint.
        seed: of the tokens.
        recompute: the fields that ask for it.
    """
    checkpoint = HFCheckpoint(directory)
    for layout in ("bshd", "thd"):
        plain = gradients(build(checkpoint), microbatches(layout, seed))
        found = gradients(build(checkpoint, **recompute), microbatches(layout, seed))
        assert found.keys() == plain.keys()
        assert max(relative(found[name], g) for name, g in plain.items() if g.any()) <= 1e-6
