"""Hugging Face's model with known faults: each is named, alone and in pairs, and none else is."""

import copy
import random

import pytest
import transformers

from glm5_patch.testing.oracle import Oracle
from glm5_patch.testing.oracle.explain import token_errors
from glm5_patch.testing.oracle.faults import FAULTS
from tests.testing.seeded import SCHEDULES, SEEDED, load, with_schedule

transformers.utils.logging.disable_progress_bar()

COMMON = {
    "indexer_rope_slice",
    "indexer_raw_query_latent",
    "rope_half_split",
    "indexer_rope_half_split",
    "indexer_relu_missing",
    "indexer_k_norm_eps",
    "indexer_hadamard_one_side",
    "yarn_megatron",
    "softmax_scale_nope",
    "schedule_offset_1",
    "router_bias_unused",
    "latent_norm_eps",
    "rope_theta_default",
    "padding_later_keys",
}
"""What the default run names; the others are nightly."""
SEVERAL = [
    ("yarn_megatron", "indexer_rope_half_split"),
    ("indexer_rope_slice", "indexer_raw_query_latent"),  # megatron-core 0.16 to 0.18
    ("rope_half_split", "rope_theta_default"),
    ("rope_missing", "rope_theta_default"),
    ("padding_last_key", "indexer_relu_missing"),
    ("rope_theta_default", "yarn_megatron", "latent_norm_eps"),  # Megatron's own defaults
    ("causal_mask_missing", "rope_half_split", "indexer_rope_half_split"),  # transformers 5.8
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def right(oracle):
    return load(oracle.checkpoint)


def seeded(oracle, right, faults):
    """The verdict on a model with these faults."""
    with pytest.MonkeyPatch.context() as patch:
        model = copy.deepcopy(right)
        for fault in faults:
            SEEDED[fault](model, patch)
        return oracle.judge(model)


def names(verdict):
    return [{fault.id for fault in one} for one in verdict.explanations]


def test_every_known_fault_is_seeded():
    assert [fault.id for fault in FAULTS] == [*SEEDED, *SCHEDULES]


def some(faults, default):
    return [
        fault if fault in default else pytest.param(fault, marks=pytest.mark.nightly)
        for fault in faults
    ]


@pytest.mark.parametrize("fault", some(SEEDED, COMMON))
def test_a_fault_is_named(oracle, right, fault):
    verdict = seeded(oracle, right, [fault])
    assert names(verdict) == [{fault}] and not verdict.passed() and verdict.passed([fault])
    (row,) = (row for row in FAULTS if row.id == fault)
    assert any(row.means in line and row.look_at in line for line in verdict.lines())
    assert row.selects == (verdict.within <= 2e-5)


@pytest.mark.parametrize("fault", some(SCHEDULES, {"schedule_offset_2"}))
def test_a_schedule_that_runs_other_layers_is_named(oracle, fault):
    with pytest.raises(AssertionError, match=fault):
        oracle.assert_builds(with_schedule(**SCHEDULES[fault]))


def test_any_other_schedule_is_named(oracle):
    with pytest.raises(AssertionError, match="index_computing_layers = 1, 4 and not 1, 2, 3, 5"):
        oracle.assert_builds(with_schedule(index_topk_freq=3, index_skip_topk_offset=1))


@pytest.mark.parametrize("faults", some(SEVERAL, SEVERAL[:1]), ids="+".join)
def test_several_faults_are_named(oracle, right, faults):
    verdict = seeded(oracle, right, faults)
    assert names(verdict) == [set(faults)]
    assert verdict.passed(faults) and not verdict.passed(faults[:1])


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_any_pair_of_faults_is_named(tmp_path, seed):
    """Where one fault hides the other, the one that shows is named."""
    oracle = Oracle(tmp_path, seed=seed)
    pairs = [
        pair
        for pair in (random.Random(seed).sample(list(SEEDED), 2) for _ in range(80))
        if not set.intersection(*({*row.changes} for row in FAULTS if row.id in pair))
    ]
    right = load(oracle.checkpoint)
    for pair in pairs:
        found = names(seeded(oracle, right, pair))
        assert found == [set(pair)] or found in [[{fault}] for fault in hidden(oracle, pair)], pair


def hidden(oracle, pair):
    """Faults of a pair that alone give the logits of the pair."""
    rows = tuple(row for row in FAULTS if row.id in pair)
    explainer = oracle.explainer
    both = explainer.forward(explainer.changed(rows)).logits
    for row in rows:
        alone = explainer.forward(explainer.changed((row,)))
        if token_errors(alone.logits, both)[alone.intact].max() <= 2e-5:
            yield row.id


@pytest.mark.parametrize("flavour", ["5.2", "5.1"])
@pytest.mark.parametrize("seed", some(range(20), {0}))
def test_a_right_model_is_right(tmp_path, seed, flavour):
    oracle = Oracle(tmp_path, flavour, seed, length=25)
    assert oracle.compare_hugging_face() <= 1e-5
    oracle.assert_matches(load(oracle.checkpoint))
