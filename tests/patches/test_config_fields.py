import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

import glm5_patch
from glm5_patch.config.fields import ALIASES, GLM5Fields, is_glm5
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import GLM5PatchError, ScheduleError
from glm5_patch.patches.probes.megatron_core import refuses_dsa

BASE = dict(
    num_layers=8, hidden_size=64, num_attention_heads=4, ffn_hidden_size=64, add_bias_linear=False
)
DSA = dict(BASE, experimental_attention_variant="dsa", rope_type="rope", dsa_is_glm5=True)
GLM_5 = dict(
    dsa_indexer_topk_freq=1,
    dsa_indexer_skip_topk_offset=0,
    dsa_indexer_types=None,
    dsa_indexer_rope_interleaved=True,
    dsa_indexer_rotate_activation=False,
    dsa_indexer_k_norm_epsilon=1e-6,
    dsa_context_parallel_order="zigzag",
    dsa_topk_across_stages=False,
)
NAMES = [field.name for field in dataclasses.fields(GLM5Fields)]


@dataclasses.dataclass
class DerivedLater(MLATransformerConfig):
    own: int = 1


@pytest.mark.parametrize("config_class", [TransformerConfig, MLATransformerConfig, DerivedLater])
def test_the_fields_are_real_fields_of_every_configuration(config_class):
    assert set(NAMES) <= {field.name for field in dataclasses.fields(config_class)}
    assert set(NAMES) <= inspect.signature(config_class).parameters.keys()
    base = {k: v for k, v in BASE.items()}
    config = config_class(**base, dsa_indexer_topk_freq=4, dsa_indexer_types="FFFSSSFS")
    assert config.dsa_indexer_topk_freq == 4
    assert dataclasses.asdict(config)["dsa_indexer_types"] == "FFFSSSFS"


@pytest.mark.parametrize(
    "through",
    [
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: MLATransformerConfig(
            **{f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.init}
        ),
    ],
    ids=["copy", "deepcopy", "replace", "pickle", "rebuild"],
)
def test_the_values_survive(through):
    values = dict(
        dsa_indexer_types=["full"] * 4 + ["shared"] * 4,
        dsa_indexer_rope_interleaved=False,
        dsa_indexer_k_norm_epsilon=None,
    )
    config = through(MLATransformerConfig(**DSA, **values))
    assert {name: getattr(config, name) for name in values} == values
    assert IndexSchedule.from_megatron(config).computing_layers == (1, 2, 3, 4)


def test_replace_can_change_them():
    config = MLATransformerConfig(**DSA, dsa_indexer_topk_freq=4)
    assert dataclasses.replace(config, dsa_indexer_topk_freq=2).dsa_indexer_topk_freq == 2


def test_a_convention_that_the_host_lacks_is_glm_5s_and_another_has_the_hosts_default():
    host = inspect.signature(inspect.unwrap(TransformerConfig.__init__)).parameters
    config = MLATransformerConfig(**DSA)
    for name, ours in GLM_5.items():
        assert getattr(config, name) == (host[name].default if name in host else ours), name
    assert not IndexSchedule.from_megatron(config).shares


@pytest.mark.parametrize("config_class", [MLATransformerConfig, DerivedLater])
@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_the_other_spelling_is_taken(config_class, alias, name):
    config = config_class(**DSA, **{alias: 3})
    assert getattr(config, name) == 3
    assert getattr(dataclasses.replace(config), name) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(dsa_indexer_topk_freq=0), "topk_freq=0"),
        (dict(dsa_indexer_skip_topk_offset=-1), "skip_topk_offset=-1"),
        (dict(dsa_indexer_types="FS"), "dsa_indexer_types has 2 entries for num_layers=8"),
        (dict(dsa_indexer_types="SFFFFFFF"), "layer 1 a skip layer"),
        (dict(dsa_indexer_topk_freq=2, dsa_index_topk_freq=4), "disagree"),
    ],
)
def test_bad_values_are_named(fields, says):
    with pytest.raises(ScheduleError, match=says):
        MLATransformerConfig(**DSA, **fields)


def test_other_models_are_not_validated():
    assert MLATransformerConfig(**BASE, dsa_indexer_types="SF").dsa_indexer_types == "SF"


def test_a_class_derived_while_patched_survives_disable_and_enable():
    glm5_patch.disable()
    glm5_patch.enable()
    assert glm5_patch.status()["config_fields"].state == "applied"
    assert DerivedLater(**DSA, dsa_index_topk_freq=4).dsa_indexer_topk_freq == 4


@pytest.fixture
def host_refuses_context_parallelism():
    from glm5_patch.patches.probes.megatron_core import refuses_context_parallel

    if not refuses_context_parallel():
        pytest.skip("this host validates DSA with context parallelism itself")


@pytest.mark.parametrize("kind", ["allgather", "all_gather", ["allgather"] * 8])
def test_context_parallelism_by_all_gather_is_accepted(host_refuses_context_parallelism, kind):
    config = MLATransformerConfig(**DSA, context_parallel_size=2, cp_comm_type=kind)
    assert config.context_parallel_size == 2
    assert dataclasses.replace(config).context_parallel_size == 2


@pytest.mark.parametrize("kind", ["p2p", "a2a", "a2a+p2p", None, ["allgather"] * 7 + ["p2p"]])
def test_other_kinds_of_context_parallelism_are_refused(host_refuses_context_parallelism, kind):
    with pytest.raises(GLM5PatchError, match='context_parallel_size=2.*set cp_comm_type="allg'):
        MLATransformerConfig(**DSA, context_parallel_size=2, cp_comm_type=kind)


CONTIGUOUS = dict(
    context_parallel_size=2, cp_comm_type="allgather", dsa_context_parallel_order="contiguous"
)


def test_contiguous_order_is_accepted_where_attention_is_ours(host_refuses_context_parallelism):
    config = MLATransformerConfig(**DSA, **CONTIGUOUS)
    assert config.dsa_context_parallel_order == "contiguous"
    with pytest.raises(GLM5PatchError, match="'contiguous' with mtp_num_layers=1.*zigzag order"):
        MLATransformerConfig(**DSA, **CONTIGUOUS, mtp_num_layers=1)


def test_a_schedule_without_stacks_sends_no_top_k():
    stages = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    with pytest.raises(GLM5PatchError, match="with overlap_moe_expert_parallel_comm=True"):
        MLATransformerConfig(
            **DSA, **stages, dsa_topk_across_stages=True, overlap_moe_expert_parallel_comm=True
        )


def test_an_unknown_order_is_named():
    with pytest.raises(GLM5PatchError, match="'ring' must be one of zigzag, contiguous"):
        MLATransformerConfig(**DSA, dsa_context_parallel_order="ring")


def test_other_models_keep_their_context_parallelism():
    split = dict(context_parallel_size=2, cp_comm_type="p2p")
    assert MLATransformerConfig(**BASE, rope_type="rope", **split).cp_comm_type == "p2p"


def schedule_of(config):
    """The computing layers, and those that freq and offset alone name."""
    numbers = config.dsa_indexer_topk_freq, config.dsa_indexer_skip_topk_offset
    by_numbers = IndexSchedule.from_freq(config.num_layers, *numbers)
    return IndexSchedule.from_megatron(config).computing_layers, by_numbers.computing_layers


def test_a_list_sets_freq_and_offset_where_they_can_say_it():
    config = MLATransformerConfig(**DSA, dsa_indexer_types="FFFSSSFS")
    assert (config.dsa_indexer_topk_freq, config.dsa_indexer_skip_topk_offset) == (4, 3)
    uneven = MLATransformerConfig(**DSA, dsa_indexer_types="FSFFSSFS")
    assert (uneven.dsa_indexer_topk_freq, uneven.dsa_indexer_skip_topk_offset) == (1, 0)
    assert IndexSchedule.from_megatron(uneven).computing_layers == (1, 3, 4, 7)


def test_a_replaced_list_or_number_is_what_counts():
    config = MLATransformerConfig(**DSA, dsa_indexer_types="FFFSSSFS")
    assert schedule_of(dataclasses.replace(config)) == ((1, 2, 3, 7),) * 2
    assert schedule_of(MLATransformerConfig(**dataclasses.asdict(config))) == ((1, 2, 3, 7),) * 2
    assert schedule_of(dataclasses.replace(config, dsa_indexer_types="FSFSFSFS")) == (
        ((1, 3, 5, 7),) * 2
    )
    by_number = dataclasses.replace(config, dsa_indexer_topk_freq=2)
    assert schedule_of(by_number) == ((1, 2, 3, 5, 7),) * 2
    assert schedule_of(dataclasses.replace(by_number, dsa_indexer_topk_freq=4)) == (
        ((1, 2, 3, 7),) * 2
    )


def test_numbers_that_a_list_beats_are_named():
    with pytest.warns(UserWarning, match="dsa_indexer_topk_freq=2.*dsa_indexer_types is taken"):
        config = MLATransformerConfig(**DSA, dsa_indexer_types="FFFSSSFS", dsa_indexer_topk_freq=2)
    assert schedule_of(config) == ((1, 2, 3, 7),) * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dsa_indexer_rope_interleaved", False),
        ("dsa_indexer_rotate_activation", True),
        ("dsa_indexer_k_norm_epsilon", 1e-5),
        ("dsa_indexer_k_norm_epsilon", None),
    ],
)
def test_what_no_glm_5_has_is_warned_about(field, value):
    with pytest.warns(UserWarning, match=f"{field}={value}, but every GLM-5 has"):
        MLATransformerConfig(**DSA, **{field: value})


def test_a_scaled_rope_is_refused():
    conventions = dict(dsa_indexer_rope_interleaved=True, dsa_indexer_rotate_activation=False)
    with pytest.raises(GLM5PatchError, match="rope_type='yarn' with rotary_scaling_factor=40"):
        MLATransformerConfig(**{**DSA, **conventions, "rope_type": "yarn"})
    MLATransformerConfig(**{**DSA, **conventions, "rope_type": "yarn"}, rotary_scaling_factor=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(dsa_is_glm5=True), True),
        (dict(dsa_is_glm5=False, dsa_indexer_topk_freq=4), False),
        (dict(dsa_indexer_topk_freq=4), True),
        (dict(dsa_index_topk_freq=4), True),
        (dict(dsa_indexer_types="FFFSSSFS"), True),
        (dict(dsa_indexer_rope_interleaved=True), True),
        (dict(dsa_indexer_rotate_activation=False), True),
        (dict(), None),
        (dict(dsa_indexer_rope_interleaved=False, dsa_indexer_rotate_activation=True), None),
        (dict(dsa_indexer_k_norm_epsilon=1e-6), None),
    ],
)
@pytest.mark.filterwarnings("ignore:dsa_indexer")
def test_which_dsa_model_is_a_glm_5(settings, expected):
    """None: where the host builds no DSA model, no other could be meant."""
    model = {name: value for name, value in DSA.items() if name != "dsa_is_glm5"}
    config = MLATransformerConfig(**model, **settings)
    assert is_glm5(config) is (refuses_dsa() if expected is None else expected)
    assert is_glm5(dataclasses.replace(config)) is is_glm5(config)
    assert not is_glm5(MLATransformerConfig(**BASE, **settings))
