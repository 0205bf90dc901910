"""A parse with the patch differs from one without it in what the release lost, and nothing else."""

import random

import pytest
from transformers import GlmMoeDsaConfig

import glm5_patch
from glm5_patch.config.schedule import HF_DEFAULT_OFFSET, IndexSchedule

VALUES = {
    "num_hidden_layers": [2, 5, 8],
    "head_dim": [48, 16, None],
    "qk_rope_head_dim": [16, 32],
    "qk_nope_head_dim": [24, 48],
    "qk_head_dim": [64],
    "n_routed_experts": [8, 128],
    "num_local_experts": [8, 16],
    "num_experts": [8],
    "num_experts_per_tok": [2],
    "rope_theta": [8e6],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 8e6}, None],
    "index_topk_freq": [1, 2, 4, None],
    "index_skip_topk_offset": [1, 2, 3, None],
    "index_topk_pattern": [None],
    "indexer_types": [None],
    "indexer_rope_interleave": [True, False, None],
    "first_k_dense_replace": [1, 3],
    "rms_norm_eps": [1e-6],
    "vocab_size": [96],
}
# What some release loses, and by which words of a config.json one can tell that it was lost.
LOST = {
    "qk_rope_head_dim": {"qk_rope_head_dim"},
    "head_dim": {"qk_rope_head_dim"},
    "qk_head_dim": {"qk_rope_head_dim"},
    "n_routed_experts": {"n_routed_experts"},
    "num_local_experts": {"n_routed_experts"},
    "num_experts": {"n_routed_experts", "num_local_experts"},
    "rope_parameters": {"rope_theta", "rope_parameters"},
    "index_topk_freq": {"index_topk_freq"},
    "index_skip_topk_offset": {"index_skip_topk_offset"},
    "indexer_rope_interleave": {"indexer_rope_interleave"},
    "indexer_types": {"index_topk_freq"},
}
NAMES = {*LOST, "layer_types", "mlp_layer_types"}


def parsed(words):
    try:
        config = GlmMoeDsaConfig(**words)
    except Exception as error:
        return {"refused": type(error).__name__}
    return config.to_dict() | {n: getattr(config, n) for n in NAMES if hasattr(config, n)}


def some_words(seed):
    choose = random.Random(seed)
    return {n: choose.choice(v) for n, v in VALUES.items() if choose.random() < 0.4}


SEEDS = range(150)


@pytest.fixture(scope="module")
def without_the_plugin():
    """Seed -> what transformers alone makes of its words."""
    glm5_patch.disable()
    try:
        return {seed: parsed(some_words(seed)) for seed in SEEDS}
    finally:
        glm5_patch.enable()


@pytest.mark.parametrize("seed", SEEDS)
def test_only_what_was_said_and_lost_differs(without_the_plugin, seed):
    words = some_words(seed)
    patched, plain = parsed(words), without_the_plugin[seed]
    said = {name for name, value in words.items() if value is not None}
    for name in patched.keys() | plain.keys():
        if patched.get(name, "absent") != plain.get(name, "absent"):
            assert LOST[name] & said, (name, words)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_said_is_there(seed):
    words = {name: value for name, value in some_words(seed).items() if value is not None}
    if "n_routed_experts" in words:
        words.pop("num_experts", None)  # from 5.13 on it is another name of the same
        words.pop("num_local_experts", None)
    config = GlmMoeDsaConfig(**words)
    for name in ("qk_rope_head_dim", "n_routed_experts", "index_topk_freq", "qk_nope_head_dim"):
        if words.get(name) is not None:
            assert getattr(config, name) == words[name]
    if words.get("index_topk_freq"):
        offset = words.get("index_skip_topk_offset")
        schedule = IndexSchedule.from_freq(
            config.num_hidden_layers,
            words["index_topk_freq"],
            HF_DEFAULT_OFFSET if offset is None else offset,
        )
        assert tuple(config.indexer_types) == schedule.types


@pytest.mark.parametrize(
    "again", [lambda c: type(c).from_dict(c.to_dict()), lambda c: type(c)(**c.to_diff_dict())]
)
def test_what_is_written_is_read_back(again):
    config = GlmMoeDsaConfig(
        num_hidden_layers=8,
        qk_rope_head_dim=16,
        n_routed_experts=8,
        index_topk_freq=4,
        index_skip_topk_offset=3,
    )
    read = again(config)
    for name in LOST:
        assert getattr(read, name, None) == getattr(config, name, None), name


def test_another_name_of_the_expert_count_is_obeyed():
    config = GlmMoeDsaConfig(num_hidden_layers=2, num_local_experts=8)
    assert config.n_routed_experts == getattr(config, "num_experts", 8) == 8
    assert GlmMoeDsaConfig(num_local_experts=8).n_routed_experts == 8


def test_what_transformers_accepts_is_not_refused():
    config = GlmMoeDsaConfig(num_hidden_layers=4, index_topk_freq=2, index_skip_topk_offset=-1)
    assert (config.index_topk_freq, config.index_skip_topk_offset) == (2, -1)
    config = GlmMoeDsaConfig(num_hidden_layers=4, indexer_types=["full", "shared"])
    assert tuple(config.indexer_types) == ("full", "shared")
