"""megatron-core's own DSA, for ``python -m tests.clients.judge --released``."""

from __future__ import annotations

from functools import cache

from glm5_patch.checkpoint.reader import HFCheckpoint
from tests.hosts import figures


@cache
def _prepare() -> None:
    figures.run_as_released()


def released(directory, **settings):
    """With GLM-5's settings where this release has them."""
    _prepare()
    return figures._model(HFCheckpoint(directory), **settings)


def defaults_of_0_19(directory):
    """With what 0.19 has for the indexer if nothing is set."""
    return released(directory, dsa_indexer_rope_interleaved=False, dsa_indexer_k_norm_epsilon=1e-5)


def defaults_of_the_rope(directory):
    """With what ``MLATransformerConfig`` has for the rope if nothing is set."""
    yarn = dict(rope_type="yarn", rotary_scaling_factor=40, mscale=1.0, mscale_all_dim=0.0)
    return released(directory, rotary_base=10000, **yarn)
