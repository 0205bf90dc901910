"""The command line of Megatron-LM's launcher: the one in megatron-core's wheel, or a stand-in."""

import argparse
import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig

import glm5_patch
from glm5_patch.config.arguments import CHOICES, model_arguments
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import CheckpointError, GLM5PatchError
from glm5_patch.patching.imports import is_there
from tests.tiny import hf_config

STAND_IN = Path(__file__).parent / "launcher"
# Not from `test_pretrain`: this is checked against the file below.
FLAGS = """
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 6 --kv-channels 40
    --multi-latent-attention --q-lora-rank 48 --kv-lora-rank 56 --qk-head-dim 24
    --qk-pos-emb-head-dim 16 --v-head-dim 80 --qk-layernorm --normalization RMSNorm
    --norm-epsilon 3e-5 --disable-bias-linear --swiglu --untie-embeddings-and-output-weights
    --padded-vocab-size 96 --position-embedding-type rope --rope-type rope --rotary-base 8000000
    --no-rope-fusion --experimental-attention-variant dsa --dsa-is-glm5 --dsa-indexer-n-heads 4
    --dsa-indexer-head-dim 32 --dsa-indexer-topk 9 --dsa-indexer-types FFFSSSFS
    --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
    --dsa-indexer-k-norm-epsilon 1e-6 --num-experts 10 --moe-layer-freq [0]*3+[1]*5
    --moe-ffn-hidden-size 72 --moe-shared-expert-intermediate-size 144 --moe-router-topk 3
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor 1.7
""".split()


@pytest.fixture(scope="module", autouse=True)
def launcher():
    """``megatron.training`` of the wheel, or ours for as long as these tests run."""
    stands_in = not is_there("megatron.training.arguments")
    if stands_in:
        sys.path.append(str(STAND_IN))
    yield importlib.import_module("megatron.training.arguments")
    if stands_in:
        sys.path.remove(str(STAND_IN))
        for name in [name for name in sys.modules if name.startswith("megatron.training")]:
            del sys.modules[name]


@pytest.fixture
def parse(launcher, monkeypatch):
    """Parse a command line as the launcher does."""

    def parse(*line, **kwargs):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *map(str, line)])
        return launcher.parse_args(**kwargs)

    return parse


@pytest.fixture
def validate(launcher, monkeypatch):
    """The check alone: a toy command line is no launch, which the host's own validation wants."""
    from glm5_patch.patches.megatron_training.arguments_check import _validate

    def accepts(args, defaults=None):
        return args

    return lambda args: _validate(accepts, None, (args,), {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launcher")
    hf_config().save_pretrained(folder)
    return folder


def test_the_seams_are_in_place():
    rows = {row.id: row.state.value for row in glm5_patch.status()}
    assert rows["config_flag"] == rows["arguments_check"] == "applied"


def test_another_model_gets_no_argument_but_those_of_dsa(parse):
    with_plugin = vars(parse())
    glm5_patch.disable()
    try:
        without = vars(parse())
    finally:
        glm5_patch.enable()
    added = {name: value for name, value in with_plugin.items() if name not in without}
    assert all(name.startswith("dsa_") for name in added)
    assert {name: with_plugin[name] for name in without} == without


def test_a_provider_of_the_program_s_own_still_adds_its_flags(parse, directory):
    def provider(parser):
        parser.add_argument("--rollout", type=int, default=1)
        return parser

    args = parse("--rollout", 3, "--glm5-config", directory, extra_args_provider=provider)
    assert (args.rollout, args.glm5_config, args.hidden_size) == (3, str(directory), 64)
    assert not hasattr(parse("--strange", ignore_unknown_args=True), "glm5_config")


def test_the_file_fills_in_what_the_flags_say(parse, validate, directory):
    by_file, by_flags = parse("--glm5-config", directory), parse(*FLAGS)
    validate(by_file)
    validate(by_flags)
    wanted = model_arguments(HFConfig.from_directory(directory))
    for name, value in wanted.items():
        assert getattr(by_file, name) == value
    both = parse(*FLAGS, f"--glm5-config={directory}")
    validate(both)
    assert IndexSchedule.from_types(both.dsa_indexer_types, 8).computing_layers == (1, 2, 3, 7)


def test_the_arguments_are_the_configuration_of_build(parse, directory):
    from glm5_patch.attention.build import transformer_config

    args = vars(parse("--glm5-config", directory))
    hf = HFConfig.from_directory(directory)
    ours = transformer_config(hf, transformer_impl="local")
    taken = {f: args[f] for f in MLATransformerConfig.__dataclass_fields__ if f in args}
    for name in hf.megatron_kwargs():
        # The launcher takes query groups under --group-query-attention alone.
        if name in taken and name != "num_query_groups":
            assert taken[name] == getattr(ours, name), name


@pytest.mark.parametrize(
    "line, message",
    [
        ("--hidden-size 128", "hidden_size is 128: give --hidden-size 64"),
        ("--rotary-base 10000", "rotary_base is 10000: give --rotary-base 8000000"),
        ("--norm-epsilon 1e-5", "give --norm-epsilon 3e-05"),
        ("--rotary-scaling-factor 40 --rope-type yarn", "give --rope-type rope"),
        ("--position-embedding-type learned_absolute", "give --position-embedding-type rope"),
        ("--moe-router-score-function softmax", "give --moe-router-score-function sigmoid"),
        ("--moe-layer-freq 1", r"give --moe-layer-freq \[0,0,0,1,1,1,1,1\]"),
        ("--dsa-indexer-topk-freq 2", "give --dsa-indexer-topk-freq 4"),
        ("--dsa-index-skip-topk-offset 1", "give --dsa-index-skip-topk-offset 3"),
        ("--dsa-indexer-types FFFFFFFF", "give --dsa-indexer-types FFFSSSFS"),
        ("--dsa-indexer-types FFF", "--dsa-indexer-types: .* 3 entries"),
        ("--no-dsa-is-glm5", "give --dsa-is-glm5"),
        ("--no-dsa-indexer-rope-interleaved", "give --dsa-indexer-rope-interleaved"),
        ("--dsa-indexer-rotate-activation", "give --no-dsa-indexer-rotate-activation"),
        ("--dsa-indexer-k-norm-epsilon 1e-5", "give --dsa-indexer-k-norm-epsilon 1e-06"),
        ("--squared-relu", "remove --squared-relu"),
        ("--group-query-attention", "remove --group-query-attention"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_refused(parse, validate, directory, line, message):
    """Before it and after it, also where the flag says the host's default."""
    for order in (
        [*line.split(), "--glm5-config", directory],
        ["--glm5-config", directory, *line.split()],
    ):
        with pytest.raises(GLM5PatchError, match=f"contradicts .*config.json: .*{message}"):
            validate(parse(*order))


@pytest.mark.parametrize(
    "line, names",
    [
        ("--hidden-size 128 --swiglu --kv-lora-rank 8", ["--hidden-size", "--kv-lora-rank"]),
        ("--q-lora-rank 3 --num-experts 4", ["--q-lora-rank 48", "--num-experts 10"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(parse, validate, directory, line, names):
    with pytest.raises(GLM5PatchError) as raised:
        validate(parse("--glm5-config", directory, *line.split()))
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    "left_out, remedy",
    [
        (["--qk-layernorm"], "qk_layernorm is False: give --qk-layernorm"),
        (["--normalization", "RMSNorm"], "give --normalization RMSNorm"),
        (["--disable-bias-linear"], "add_bias_linear is True: give --disable-bias-linear"),
        (["--swiglu"], "give --swiglu"),
        (["--multi-latent-attention"], "give --multi-latent-attention"),
        (["--position-embedding-type", "rope"], "give --position-embedding-type rope"),
        (["--moe-router-score-function", "sigmoid"], "give --moe-router-score-function sigmoid"),
        (["--moe-router-enable-expert-bias"], "give --moe-router-enable-expert-bias"),
    ],
)
def test_flags_that_leave_one_out_are_refused(parse, validate, left_out, remedy):
    line = " ".join(FLAGS).replace(" ".join(left_out) + " ", "")
    with pytest.raises(
        GLM5PatchError, match=f"does not describe a GLM-5: .*{remedy}.*--glm5-config"
    ):
        validate(parse(*line.split()))


def test_what_a_host_defaults_to_otherwise_is_named(parse, validate):
    """megatron-core 0.19's switches are DeepSeek-V3.2's; older cores have ours, which are None."""
    line = " ".join(FLAGS)
    for flag in ("--dsa-indexer-rope-interleaved", "--no-dsa-indexer-rotate-activation"):
        line = line.replace(f"{flag} ", "")
    args = parse(*line.split())
    if args.dsa_indexer_rotate_activation is None:
        validate(args)
        return
    with pytest.raises(GLM5PatchError, match="--no-dsa-indexer-rotate-activation"):
        validate(args)


@pytest.mark.parametrize(
    "line",
    [
        "--num-layers 2 --hidden-size 64",
        "--experimental-attention-variant dsa --no-dsa-is-glm5",
        "--experimental-attention-variant dsa --no-dsa-is-glm5 --dsa-indexer-topk-freq 2",
    ],
)
def test_other_models_are_left_alone(parse, validate, line):
    args = parse(*line.split())
    before = dict(vars(args))
    assert validate(args) is args
    assert vars(args) == before


@pytest.mark.parametrize(
    "line",
    [
        "--attention-dropout 0.1 --hidden-dropout 0.1",
        "--moe-router-load-balancing-type seq_aux_loss",
        "--position-embedding-type none",
        "--max-position-embeddings 4096",
        "--dsa-indexer-topk-freq 4 --dsa-indexer-skip-topk-offset 3",
        "--dsa-indexer-types FFFS SSFS",
        "--mtp-num-layers 1",
    ],
)
def test_what_training_chooses_is_free(parse, validate, directory, line):
    validate(parse("--glm5-config", directory, *line.split()))


def test_a_file_that_is_no_glm5_is_refused(parse, tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        parse("--glm5-config", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    with pytest.raises(CheckpointError, match="deepseek_v3"):
        parse("--glm5-config", tmp_path)


def test_arguments_from_elsewhere_are_not_half_filled(monkeypatch, directory):
    from glm5_patch.patches.megatron_training.config_flag import _parse

    monkeypatch.setattr(sys, "argv", ["x", "--glm5-config", str(directory)])

    def parse_args(extra_args_provider=None):
        return argparse.Namespace()

    with pytest.raises(GLM5PatchError, match="--yaml-cfg"):
        _parse(parse_args, None, (), {})


def test_a_checkpoint_s_arguments_are_restored(parse, directory, tmp_path, monkeypatch):
    from glm5_patch.patches.megatron_training.checkpoint_arguments import CheckpointArguments, _load

    saved = parse("--glm5-config", directory, "--mtp-num-layers", 1)
    (tmp_path / "args.pickle").write_bytes(pickle.dumps(saved))
    monkeypatch.syspath_prepend(STAND_IN / "megatron" / "training")
    checkpointing = importlib.import_module("checkpointing")
    assert CheckpointArguments().needed(checkpointing).needed
    args = parse("--load", tmp_path, "--hidden-dropout", 0.2)
    found, _ = _load(checkpointing.load_args_from_checkpoint, None, (args,), {})
    for name, value in model_arguments(HFConfig.from_directory(directory)).items():
        if name not in CHOICES:
            assert getattr(found, name) == value, name
    assert (found.mtp_num_layers, found.hidden_dropout) == (1, 0.2)
    other = parse("--num-experts", 4)
    (tmp_path / "args.pickle").write_bytes(pickle.dumps(other))
    args = parse("--load", tmp_path)
    before = {**vars(args), "num_experts": 4}
    found, _ = _load(checkpointing.load_args_from_checkpoint, None, (args,), {})
    assert vars(found) == before
    assert _load(checkpointing.load_args_from_checkpoint, None, (parse(),), {}).load is None
