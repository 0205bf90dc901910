"""The planner's estimate against the count of active parameters, and literal numbers."""

import json
from math import prod

import pytest

from glm5_patch.checkpoint.names import expected_tensors
from glm5_patch.config.costs import estimate
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.tools import cli
from tests.config.test_schedule import CONFIGS, published

NO_KEYS = 0  # a sequence so short that nothing is scored or attended to
LAYERS, EXPERTS, ACTIVE = 78, 256, 8


@pytest.fixture(scope="module")
def glm_5_2():
    return HFConfig(published("glm-5.2.json"))


def matrices(hf, mtp_layers=0) -> dict[int, float]:
    """Layer (from 0; -1: outside) -> numbers of its matrices that one token meets."""
    found = dict.fromkeys(range(-1, LAYERS + mtp_layers), 0.0)
    for name, shape in expected_tensors(hf, mtp_layers).items():
        if len(shape) == 2 and "embed_tokens" not in name:
            layer = int(name.split(".")[2]) if ".layers." in name else -1
            share = ACTIVE / EXPERTS if ".experts." in name else 1
            found[layer] += prod(shape) * share
    return found


def test_without_keys_a_token_costs_two_operations_for_each_active_number(glm_5_2):
    costs, expected = estimate(glm_5_2, NO_KEYS), matrices(glm_5_2, mtp_layers=1)
    head = 2 * expected.pop(-1)
    mtp = 2 * expected.pop(LAYERS)
    assert costs.layers == pytest.approx([2 * expected[n] for n in range(LAYERS)], rel=1e-9)
    assert costs.output == head
    assert costs.mtp == pytest.approx(mtp + head, rel=1e-9)
    assert 38e9 < sum(expected.values()) + head / 2 < 42e9  # published as 40 billion active


@pytest.mark.parametrize(("length", "attended"), [(1024, 512), (4096, 2048), (65536, 2048)])
def test_keys_cost_what_attention_and_indexer_do_with_them(glm_5_2, length, attended):
    """64 heads on a latent of 576, of which 512 are values too; 32 heads of 128 in the indexer,
    which sees half of the sequence on average."""
    plain, costs = estimate(glm_5_2, NO_KEYS), estimate(glm_5_2, length)
    attention, scores = 2 * 64 * attended * (576 + 512), 2 * 32 * 128 * (length // 2)
    for number in range(1, LAYERS + 1):
        computes = number <= 3 or (number - 3) % 4 == 0
        more = costs.layers[number - 1] - plain.layers[number - 1]
        assert more == pytest.approx(attention + computes * scores, rel=1e-9), number
    assert costs.mtp - plain.mtp == pytest.approx(attention + scores, rel=1e-9)


@pytest.mark.parametrize("mtp", [False, True])
def test_the_plan_counts_output_and_mtp_on_the_last_stage(glm_5_2, mtp, capsys):
    flags = ["--config", str(CONFIGS / "glm-5.2.json"), "--pp", "4", "--seq-length", "8192"]
    assert cli.main(["plan", *flags, "--json", *(["--mtp"] if mtp else [])]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    costs = estimate(glm_5_2, 8192)
    ends = [sum(plan["layers"][: n + 1]) for n in range(4)]
    times = [sum(costs.layers[end - size : end]) for end, size in zip(ends, plan["layers"])]
    times[-1] += costs.output + mtp * costs.mtp
    assert plan["slowest_over_mean"] == pytest.approx(max(times) / (sum(times) / 4), abs=6e-4)
    assert ends[-1] == LAYERS
