"""The estimate of a split's cost: near what was measured, and of splits that can be run."""

import json

import pytest

from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.parallel_costs import parallel_costs
from glm5_patch.tools import cli
from tests.config.test_schedule import CONFIGS, published

GLM_5_2 = str(CONFIGS / "glm-5.2.json")
MEASURED_MODEL = dict(
    model_type="glm_moe_dsa",
    num_hidden_layers=7,
    first_k_dense_replace=3,
    index_topk_freq=4,
    index_skip_topk_offset=3,
    num_nextn_predict_layers=0,
    vocab_size=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 8e6},
    n_routed_experts=8,
)


def rate(tokens, gpus=4, **sizes):
    split = {"tp": 1, "cp": 1, "ep": gpus, "pp": 1, **sizes}
    costs = parallel_costs(HFConfig(MEASURED_MODEL), tokens, gpus)
    (found,) = (
        cost for cost in costs if {name: getattr(cost.split, name) for name in split} == split
    )
    return found.rate


@pytest.mark.parametrize(
    "tokens, sizes, measured",
    [
        (8192, {}, 0.917),
        (32768, {}, 0.932),
        (8192, {"tp": 4}, 0.625),
        (32768, {"tp": 4}, 0.791),
        (8192, {"cp": 4}, 0.722),
        (32768, {"cp": 4}, 0.888),
    ],
    ids=str,
)
def test_estimates_are_near_what_was_measured_on_four_h100s(tokens, sizes, measured):
    assert rate(tokens, **sizes) == pytest.approx(measured, abs=0.04)


@pytest.mark.parametrize(
    "tokens, sizes, measured",
    [
        (8192, {}, 0.933),
        (32768, {}, 0.950),
        (8192, {"tp": 2}, 0.802),
        (32768, {"tp": 2}, 0.859),
        (8192, {"cp": 2}, 0.834),
        (32768, {"cp": 2}, 0.931),
    ],
    ids=str,
)
def test_estimates_are_near_what_was_measured_on_two_h100s(tokens, sizes, measured):
    assert rate(tokens, gpus=2, **sizes) == pytest.approx(measured, abs=0.04)


def test_longer_sequences_are_cheaper_to_split():
    for sizes in ({"cp": 4}, {"tp": 4}, {"tp": 2, "cp": 2}):
        assert rate(8192, **sizes) < rate(32768, **sizes) < rate(131072, **sizes) < 1


@pytest.mark.parametrize("gpus", [1, 48, 64])
def test_every_split_uses_all_gpus_and_divides_the_model(gpus):
    costs = parallel_costs(HFConfig(published("glm-5.2.json")), 8192, gpus)
    assert costs and len({cost.split for cost in costs}) == len(costs)
    for split in (cost.split for cost in costs):
        assert split.tp * split.cp * split.pp * split.dp == gpus
        assert gpus // split.pp % split.ep == 0 == 256 % split.ep
    assert all(first.rate >= second.rate for first, second in zip(costs, costs[1:]))


def plan(capsys, *arguments):
    code = cli.main(["plan", "--config", GLM_5_2, *arguments])
    return code, capsys.readouterr()


def test_the_plan_of_many_gpus_fits_into_them(capsys):
    code, shown = plan(capsys, "--tokens", "32768", "--gpus", "256", "--json")
    found = json.loads(shown.out)
    assert code == 0 and found["fits"]
    assert all(split["gib"] <= 80 for split in found["splits"])
    assert found["splits"][0]["rate"] >= max(one["rate"] for one in found["one_kind"].values())
    for split in found["splits"]:
        flags = split["megatron_flags"]
        assert flags["--expert-tensor-parallel-size"] == 1
        # The default of Megatron-LM is refused.
        assert flags.get("--cp-comm-type") == ("allgather" if split["cp"] > 1 else None)


def test_too_few_gpus_are_compared_all_the_same(capsys):
    code, shown = plan(capsys, "--tokens", "8192", "--gpus", "4")
    assert code == 0
    assert "no split fits into 80 GiB" in shown.out and "TP and CP" in shown.out


def test_few_tokens_of_a_gpu_are_warned_of(capsys):
    arguments = ("--gpus", "64", "--gpu-memory", "9999")
    for tokens, warned in (("8192", True), ("32768", False)):
        assert (
            "fewer than 8192 tokens" in plan(capsys, "--tokens", tokens, *arguments)[1].out
        ) == warned
        _, shown = plan(capsys, "--tokens", tokens, *arguments, "--json")
        for split in json.loads(shown.out)["splits"]:
            assert split["tokens_per_gpu"] == int(tokens) // (split["tp"] * split["cp"])


def test_a_pipeline_or_gpus_are_planned_and_not_both(capsys):
    for arguments in ((), ("--pp", "4", "--gpus", "4")):
        code, shown = plan(capsys, *arguments)
        assert code == 2 and "--gpus" in shown.err
