"""Command lines made of the configuration's fields, as ``pretrain_gpt.py`` has one."""

import argparse
import dataclasses
import importlib.util
import json
import typing

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from glm5_patch.config.fields import GLM5Fields
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.patches.probes.megatron_core import why_arguments_fail
from tests.activation.fresh import output

DSA_FIELDS = [f for f in dataclasses.fields(TransformerConfig) if f.name.startswith("dsa_")]
SWITCHES = [f for f in DSA_FIELDS if isinstance(f.default, bool) or "rope" in f.name]
# One launch script for every release.
GLM_5_2 = (
    "--dsa-is-glm5 --dsa-indexer-topk-freq 4 --dsa-indexer-skip-topk-offset 3 "
    "--dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation "
    "--dsa-indexer-k-norm-epsilon 1e-6"
)
MODEL = dict(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=4,
    add_bias_linear=False,
    experimental_attention_variant="dsa",
    rope_type="rope",
)


def settings_of(field):
    """What a builder like the host's gives ``add_argument`` for a field."""
    names = ["--" + field.name.replace("_", "-")]
    settings = {"dest": field.name, "default": field.default}
    kind = field.type
    if typing.get_origin(kind) is not typing.Literal and type(None) in typing.get_args(kind):
        assert len(typing.get_args(kind)) == 2, f"{field.name}: a union is no type of an argument"
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        settings |= {"type": str, "choices": typing.get_args(kind)}
    elif typing.get_origin(kind) is list:
        settings |= {"type": typing.get_args(kind)[0], "nargs": "+"}
    elif kind is bool:
        settings["action"] = "store_false" if field.default else "store_true"
    else:
        settings["type"] = kind
    settings |= field.metadata.get("argparse_meta", {})
    return settings.pop("arg_names", names), settings


def parse(line=""):
    parser = argparse.ArgumentParser(exit_on_error=False)
    for field in DSA_FIELDS:
        names, settings = settings_of(field)
        parser.add_argument(*names, **settings)
    parser.format_help()
    return vars(parser.parse_args(line.split()))


def test_what_is_not_said_has_its_default():
    assert parse() == {field.name: field.default for field in DSA_FIELDS}


def test_the_types_are_types():
    for config_class in (TransformerConfig, MLATransformerConfig):
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(GLM5Fields):
            assert not isinstance(hints[field.name], str)
            assert hints[field.name] == config_class.__dataclass_fields__[field.name].type


def test_a_glm_5_2_by_flags():
    config = MLATransformerConfig(**MODEL, **parse(GLM_5_2))
    assert IndexSchedule.from_megatron(config).computing_layers == (1, 2, 3, 7)
    assert config.dsa_indexer_rope_interleaved is True
    assert config.dsa_indexer_rotate_activation is False
    assert config.dsa_indexer_k_norm_epsilon == 1e-6


@pytest.mark.parametrize(
    "types",
    ["FFFSSSFS", "FFFS SSFS", "F,F,F,S,S,S,F,S", "full full full shared shared shared full shared"],
)
def test_a_schedule_by_flags(types):
    config = MLATransformerConfig(**MODEL, **parse(f"--dsa-indexer-types {types}"))
    assert IndexSchedule.from_megatron(config).computing_layers == (1, 2, 3, 7)
    assert config.dsa_indexer_topk_freq == 4
    assert config.dsa_indexer_skip_topk_offset == 3


@pytest.mark.parametrize("field", SWITCHES, ids=lambda field: field.name)
def test_a_switch_turns_both_ways(field):
    flag = field.name.replace("_", "-")
    assert parse(f"--{flag}")[field.name] is True
    assert parse(f"--no-{flag}")[field.name] is False
    assert parse(f"--disable-{flag}")[field.name] is False
    assert parse(f"--{flag} --no-{flag}")[field.name] is False


def test_other_flags():
    line = (
        "--dsa-context-parallel-order contiguous --dsa-index-topk-freq 2 "
        "--dsa-index-skip-topk-offset 1"
    )
    found = parse(line)
    assert found["dsa_context_parallel_order"] == "contiguous"
    assert (found["dsa_index_topk_freq"], found["dsa_index_skip_topk_offset"]) == (2, 1)
    with pytest.raises(argparse.ArgumentError, match="contigous"):
        parse("--dsa-context-parallel-order contigous")


def test_the_probe_sees_a_type_that_is_a_string():
    assert why_arguments_fail(TransformerConfig) is None
    wrong = dataclasses.make_dataclass("Wrong", [("dsa_indexer_topk_freq", "int", 1)])
    assert "dsa_indexer_topk_freq" in why_arguments_fail(wrong)


PARSER = """
import argparse, contextlib, io, json
import torch
with contextlib.redirect_stdout(io.StringIO()) as printed:
    from megatron.training.arguments import add_megatron_arguments
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    parser.format_usage()
found = {name: repr(value) for name, value in vars(parser.parse_args([])).items()}
found["printed"] = printed.getvalue()
print(json.dumps(found))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core came without megatron.training",
)
def test_the_hosts_own_parser_is_the_same_for_a_model_of_another_kind():
    """The whole namespace, and what it prints, with and without this package."""
    with_plugin = json.loads(output(PARSER))
    without = json.loads(output(PARSER, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    off = json.loads(output(PARSER, GLM5_PATCH="0"))
    assert off == without
    added = {name: value for name, value in with_plugin.items() if name not in without}
    assert with_plugin == without | added
    missing = dataclasses.fields(GLM5Fields)
    assert added == {f.name: repr(f.default) for f in missing if f.name not in without}
