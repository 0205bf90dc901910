"""Every plan is accepted by megatron-core's own validation and by the check at build time."""

import dataclasses
import itertools
import json
import random
import time

import megatron.core
import pytest
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.pipeline_split import best_splits
from glm5_patch.errors import PipelineSplitError
from glm5_patch.tools import cli
from glm5_patch.tools.plan.pipeline import layout, why_not_uniform
from tests.config.test_schedule import published
from tests.patches.test_pipeline_split import glm_5_2


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published("glm-5.2.json")))
    return str(path)


def build(pp, vpp, split, virtual_pipeline, **fields):
    """The spec of the first and the last chunk, through the host's builder."""
    virtual = vpp if vpp > 1 else None
    config = glm_5_2(
        pp,
        **fields,
        pipeline_model_parallel_layout=layout(split),
        virtual_pipeline_model_parallel_size=virtual,
    )
    virtual_pipeline(virtual)
    return [
        specs.get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=stage if virtual else None, pp_rank=rank
        )
        for stage, rank in ((0, 0), (vpp - 1, pp - 1))
    ]


@pytest.mark.parametrize("vpp", [1, 2, 3, 4])
def test_every_plan_of_glm_5_2_is_accepted(world, vpp, virtual_pipeline):
    schedule = HFConfig(published("glm-5.2.json")).schedule
    for pp in range(2, 27):
        (split,) = best_splits(schedule, pp * vpp)
        first, last = build(pp, vpp, split, virtual_pipeline)
        assert len(first.layer_specs) == split.sizes[0]
        assert len(last.layer_specs) == split.sizes[-1]


@pytest.mark.parametrize("vpp", [1, 2])
def test_every_free_plan_is_accepted_with_the_switch(world, vpp, virtual_pipeline):
    schedule = HFConfig(published("glm-5.2.json")).schedule
    for pp in range(2, 27, 3):
        (split,) = best_splits(schedule, pp * vpp, any_layer=True)
        first, last = build(pp, vpp, split, virtual_pipeline, dsa_topk_across_stages=True)
        assert len(first.layer_specs) == split.sizes[0]
        assert len(last.layer_specs) == split.sizes[-1]


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (2, 2), (4, 1), (8, 2)])
def test_a_plan_moved_by_one_layer_is_refused(world, pp, vpp, virtual_pipeline):
    schedule = HFConfig(published("glm-5.2.json")).schedule
    (split,) = best_splits(schedule, pp * vpp)
    moved = dataclasses.replace(
        split, sizes=(split.sizes[0] + 1, split.sizes[1] - 1, *split.sizes[2:])
    )
    with pytest.raises(PipelineSplitError):
        build(pp, vpp, moved, virtual_pipeline)


def host_accepts(split):
    """What megatron-core's own check (0.19 on) says of every chunk, by freq and offset."""
    config = glm_5_2(
        1, dsa_indexer_types=None, dsa_indexer_topk_freq=4, dsa_indexer_skip_topk_offset=3
    )
    ends = list(itertools.accumulate(split.sizes, initial=0))
    try:
        for begin, end in itertools.pairwise(ends):
            specs._validate_dsa_index_share_pipeline_split(config, range(begin, end))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_the_hosts_own_check_agrees(world, seed):
    if not hasattr(specs, "_validate_dsa_index_share_pipeline_split"):
        pytest.skip(f"megatron-core {megatron.core.__version__} has no such check of its own")
    rng = random.Random(seed)
    schedule = HFConfig(published("glm-5.2.json")).schedule
    for chunks in (2, 3, 4, 8, 13, 16, 26):
        (split,) = best_splits(schedule, chunks)
        assert host_accepts(split)
        cuts = sorted(rng.sample(range(1, 78), chunks - 1))
        sizes = [b - a for a, b in itertools.pairwise((0, *cuts, 78))]
        anything = dataclasses.replace(split, sizes=tuple(sizes))
        assert host_accepts(anything) == all(schedule.computes(cut + 1) for cut in cuts)


def test_the_command_prints_flags_reason_and_picture(config_json, capsys):
    start = time.perf_counter()
    assert cli.main(["plan", "--config", config_json, "--pp", "4"]) == 0
    out = capsys.readouterr().out
    assert time.perf_counter() - start < 5
    assert "equal chunks are refused: 78 layers do not divide into 4 equal chunks" in out
    assert "--pipeline-model-parallel-layout 'Et*" in out
    assert "Megatron-Bridge provider, with a layout:" in out
    assert "FFFsssFsss" in out


def test_plans_are_ranked_and_two_numbers_are_offered_too(config_json, capsys):
    cli.main(["plan", "--config", config_json, "--pp", "8", "--json", "--top", "20"])
    report = json.loads(capsys.readouterr().out)
    balance = [plan["slowest_over_mean"] for plan in report["plans"]]
    assert balance == sorted(balance) and len(balance) == 20
    assert report["first_and_last"]["layers"] == [2, 12, 12, 12, 12, 12, 12, 4]
    assert report["first_and_last"]["megatron_flags"] == {
        "--pipeline-model-parallel-size": 8,
        "--decoder-first-pipeline-num-layers": 2,
        "--decoder-last-pipeline-num-layers": 4,
    }
    assert report["first_and_last"]["bridge_provider"] == {
        "pipeline_model_parallel_size": 8,
        "num_layers_in_first_pipeline_stage": 2,
        "num_layers_in_last_pipeline_stage": 4,
    }


def test_multi_token_prediction_goes_to_the_last_chunk(config_json, capsys):
    cli.main(["plan", "--config", config_json, "--pp", "8", "--vpp", "2", "--mtp", "--json"])
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert best["megatron_flags"]["--pipeline-model-parallel-layout"].endswith("mL")
    assert best["bridge_provider"]["virtual_pipeline_model_parallel_size"] == 2


@pytest.mark.parametrize("flags", [["--pp", "80", "--mtp"], ["--pp", "32", "--vpp", "4"]])
def test_more_chunks_than_computing_layers_get_a_plan(flags, config_json, capsys):
    assert cli.main(["plan", "--config", config_json, *flags, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans and all(sum(plan["layers"]) == 78 for plan in plans)


def free_plan(config_json, capsys, *options):
    """The first one."""
    command = ["plan", "--config", config_json, "--topk-across-stages", "--json", *options]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)["plans"][0]


def test_free_plans_say_what_is_sent(config_json, capsys):
    plan = free_plan(config_json, capsys, "--pp", "8")
    assert plan["layers"] == [10] * 7 + [8] and plan["slowest_over_mean"] <= 1.05
    # Stages 3, 5 and 7 start on a skip layer: on layers 21, 41 and 61.
    assert plan["topk_bytes_per_token"] == [0, 4096, 0, 4096, 0, 4096, 0]
    assert plan["megatron_flags"]["--dsa-topk-across-stages"] is True
    assert plan["bridge_provider"]["dsa_topk_across_stages"] is True
    longer = free_plan(config_json, capsys, "--pp", "8", "--seq-length", "65537")
    assert max(longer["topk_bytes_per_token"]) == 8192
    short = free_plan(config_json, capsys, "--pp", "8", "--seq-length", "2048")
    assert not any(short["topk_bytes_per_token"])
    assert short["bridge_provider"]["dsa_topk_across_stages"] is True


def test_a_free_plan_that_needs_no_switch_sets_none(config_json, capsys):
    plan = free_plan(config_json, capsys, "--pp", "1")
    assert "dsa_topk_across_stages" not in plan["bridge_provider"]


def test_the_printed_free_plan_can_be_copied(config_json, capsys):
    cli.main(["plan", "--config", config_json, "--pp", "8", "--topk-across-stages"])
    out = capsys.readouterr().out
    assert "3 of 7 boundaries carry the top-k: 4 KiB a token" in out
    assert "  --dsa-topk-across-stages\n" in out and "dsa_topk_across_stages = True" in out


def test_too_many_chunks_are_an_error(config_json, capsys):
    assert cli.main(["plan", "--config", config_json, "--pp", "43", "--vpp", "3"]) == 2
    assert "129 chunks" in capsys.readouterr().err


def test_uniform_splits_are_explained():
    schedule = HFConfig(published("glm-5.2.json")).schedule
    assert "layer 40, a skip layer whose source, layer 39" in why_not_uniform(schedule, 2)
    assert why_not_uniform(HFConfig(published("glm-5.1.json")).schedule, 2) is None


def test_a_wrong_path_is_named(tmp_path, capsys):
    assert cli.main(["plan", "--config", str(tmp_path / "x.yaml"), "--pp", "2"]) == 2
    assert "x.yaml: no such file" in capsys.readouterr().err


def test_a_plan_has_the_pattern_of_a_hybrid_model(config_json, capsys):
    """Attention and MLP of each layer stay in one stage, and the first three are dense."""
    cli.main(["plan", "--config", config_json, "--pp", "4", "--mtp", "--json"])
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    decoder, mtp = plan["hybrid_layer_pattern"].split("/")
    assert mtp == "DE" and decoder.replace("|", "") == "D-" * 3 + "DE" * 75
    assert [len(stage) // 2 for stage in decoder.split("|")] == plan["layers"]
