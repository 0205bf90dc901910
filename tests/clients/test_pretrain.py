"""Megatron-LM's pretrain_gpt.py: by flags, by config.json, saved and resumed, it is one GLM-5."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm5_patch.checkpoint.reader import HFCheckpoint
from tests.clients.pretrain import STEPS, TRAINING, Run, launch, launch_stages
from tests.tiny import hf_config, saved

SOURCE = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(
    not SOURCE,
    reason="MEGATRON_LM names no source tree of Megatron-LM (of the release of megatron-core here)",
)
HALF = STEPS // 2
ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
IN_THE_TREE = {**os.environ, "PYTHONPATH": PATH}
FLAGS = """
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 6 --kv-channels 40
    --multi-latent-attention --q-lora-rank 48 --kv-lora-rank 56 --qk-head-dim 24
    --qk-pos-emb-head-dim 16 --v-head-dim 80 --qk-layernorm --normalization RMSNorm
    --norm-epsilon 3e-5 --disable-bias-linear --swiglu --untie-embeddings-and-output-weights
    --padded-vocab-size 96 --max-position-embeddings 32 --position-embedding-type rope
    --rope-type rope --rotary-base 8000000 --no-rope-fusion --attention-dropout 0
    --hidden-dropout 0 --experimental-attention-variant dsa --dsa-is-glm5 --dsa-indexer-n-heads 4
    --dsa-indexer-head-dim 32 --dsa-indexer-topk 9 --dsa-indexer-types FFFSSSFS
    --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
    --dsa-indexer-k-norm-epsilon 1e-6 --num-experts 10 --moe-layer-freq [0]*3+[1]*5
    --moe-ffn-hidden-size 72 --moe-shared-expert-intermediate-size 144 --moe-router-topk 3
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor 1.7 --moe-router-pre-softmax
    --moe-router-load-balancing-type none --moe-router-dtype fp32
"""
"""The same model as ``tests.tiny.hf_config`` makes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pretrain")
    hf_config().save_pretrained(made / "hf")
    return made


@pytest.fixture(scope="module")
def by_config(folder):
    """The run that the others are compared with; it leaves a checkpoint at half of its steps."""
    return Run(
        launch(
            SOURCE,
            *("--glm5-config", str(folder / "hf")),
            *("--save", str(folder / "saved"), "--save-interval", str(HALF)),
        )
    )


def test_the_loss_falls(by_config):
    assert sorted(by_config.steps) == list(range(1, STEPS + 1))
    assert float(by_config.steps[STEPS][0]) < float(by_config.steps[1][0]) - 0.1


def test_it_is_the_model_of_build(by_config, folder):
    by_build = Run(
        launch(
            SOURCE,
            *("--glm5-config", str(folder / "hf")),
            module="tests.clients.pretrain",
            GLM5_TEST_CONFIG=str(folder / "hf"),
        )
    )
    assert "built by glm5_patch.attention.build" in by_build.output
    assert by_build.steps == by_config.steps
    assert by_build.test_loss == by_config.test_loss


def test_flags_alone_make_it(by_config):
    assert Run(launch(SOURCE, *FLAGS.split())).steps == by_config.steps


@pytest.mark.parametrize("model", ["--use-checkpoint-args", "--glm5-config"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(by_config, folder, model):
    arguments = [model] if model == "--use-checkpoint-args" else [model, str(folder / "hf")]
    resumed = Run(launch(SOURCE, *arguments, "--load", str(folder / "saved"), "--ckpt-step", "10"))
    assert_goes_on(resumed.steps, by_config.steps)
    assert resumed.test_loss == by_config.test_loss


@pytest.mark.parametrize(
    "split", ["Et*6|t*2mL", "Et*4|t*4mL --dsa-topk-across-stages"], ids=["computing", "skip"]
)
def test_a_pipeline_of_two_stages_goes_on_with_the_same_losses(by_config, folder, split):
    """The second stage starts on layer 7, which computes, or on layer 5, a skip layer."""
    resumed = Run(
        launch_stages(
            SOURCE,
            *("--glm5-config", str(folder / "hf")),
            *("--load", str(folder / "saved"), "--ckpt-step", str(HALF), "--no-load-rng"),
            *("--pipeline-model-parallel-layout", *split.split()),
        )
    )
    assert sorted(resumed.steps) == [n for n in by_config.steps if n > HALF]
    for number in range(HALF + 3, STEPS + 1):
        found, expected = ([float(v) for v in run.steps[number]] for run in (resumed, by_config))
        assert found == pytest.approx(expected, rel=2e-6), number


def assert_goes_on(resumed, expected):
    """Equal, to the last digit that is printed."""
    assert sorted(resumed) == [n for n in expected if n > HALF]
    first, second = HALF + 1, HALF + 2
    for number, values in resumed.items():
        if number == second:
            # Megatron-LM keeps the losses of its first step for the next line: it prints the mean.
            *losses, _ = map(float, values)
            means = [(float(a) + float(b)) / 2 for a, b in zip(expected[first], expected[second])]
            assert losses == pytest.approx(means[:2], abs=2e-6)
            assert values[2] == expected[second][2]
        else:
            assert values == expected[number]


def test_a_checkpoint_is_evaluated(by_config, folder):
    evaluated = Run(
        launch(SOURCE, "--use-checkpoint-args", "--load", str(folder / "saved"), "--skip-train")
    )
    assert not evaluated.steps
    assert evaluated.test_loss == by_config.test_loss


@pytest.mark.nightly
def test_recompute_changes_nothing(by_config, folder):
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    run = Run(launch(SOURCE, "--glm5-config", str(folder / "hf"), *recompute.split()))
    assert run.steps == by_config.steps


def test_a_command_line_that_contradicts_the_file_is_refused(folder):
    result = launch(SOURCE, "--glm5-config", str(folder / "hf"), "--hidden-size", "128")
    assert result.returncode != 0
    assert "hidden_size is 128: give --hidden-size 64" in result.stderr


PHASE = (
    *("--dsa-indexer-loss-coeff", "100"),  # so that the norm of its gradients is printed
    *("--dsa-indexer-loss-layers", "served", "--dsa-training-phase"),
)


def test_a_training_goes_through_its_phases(folder):
    """A dense warm-up, resumed in the same phase, and then the next one without its optimizer."""
    model = ("--glm5-config", str(folder / "hf"))
    saves = ("--save", str(folder / "warm"), "--save-interval", str(HALF))
    warm = Run(launch(SOURCE, *model, *saves, *PHASE, "dense_warmup"))
    loads = ("--load", str(folder / "warm"), "--ckpt-step", str(HALF))
    resumed = Run(launch(SOURCE, *model, *loads, *PHASE, "dense_warmup"))
    assert_goes_on(resumed.steps, warm.steps)
    following = ("joint", "--dsa-indexer-use-sparse-loss", "--no-load-optim")
    joint = Run(launch(SOURCE, *model, *loads, *PHASE, *following))
    assert sorted(joint.steps) == [n for n in warm.steps if n > HALF]
    assert all(float(norm) > 0 for run in (warm, joint) for *_, norm in run.steps.values())
    # The trunk trains only now.
    assert abs(float(joint.steps[STEPS][0]) - float(warm.steps[STEPS][0])) > 0.01


def test_the_example_starts_from_hugging_face_weights_and_writes_them_back(tmp_path):
    source = saved(tmp_path / "hf")
    script = str(Path(SOURCE) / "pretrain_gpt.py")
    flags = TRAINING.replace("--mtp-num-layers 1", "").split()
    still = ["--lr", "0", "--min-lr", "0", "--train-iters", "2"]
    places = [script, str(source.directory), str(tmp_path / "trained")]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "examples/megatron_lm_hf.py",
        *places,
        *flags,
        *still,
    ]
    result = subprocess.run(command, cwd=ROOT, env=IN_THE_TREE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    trained = HFCheckpoint(tmp_path / "trained")
    assert trained.shapes == source.shapes
    moved = {n for n in source.shapes if not torch.equal(trained.read(n), source.read(n))}
    # Megatron-LM moves the bias of the experts whatever the learning rate is.
    assert all(name.endswith("e_score_correction_bias") for name in moved)
