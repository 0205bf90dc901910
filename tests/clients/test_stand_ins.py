"""Programs that do a part themselves: they count where they are right, and are named."""

import inspect
import sys
from contextvars import ContextVar
from types import FunctionType

import pytest
import torch

import glm5_patch
from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches import announce, table
from tests.clients.stacks import MODES, block, causal_mask, config, gradients
from tests.patches.test_frozen import adapt
from tests.tiny import relative


def own_forward():
    """A client that runs the layers in a forward of its own, as mcore-bridge does."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_block import TransformerBlock

    class Block(TransformerBlock):
        def forward(self, hidden_states, attention_mask, **kwargs):
            for layer in self.layers:

                def run(hidden, layer=layer):
                    return layer(hidden, attention_mask=attention_mask)[0]

                if self.config.recompute_granularity == "full":
                    hidden_states = tensor_parallel.checkpoint(run, False, hidden_states)
                else:
                    hidden_states = run(hidden_states)
            return hidden_states

    return Block


def own_carrier(attention_class):
    """A client's subclass that chooses what the shared top-k hangs on."""

    class DSAttention(attention_class):
        def _get_index_share_carrier(self, packed_seq_params, attention_mask):
            return attention_mask if attention_mask is not None else self.config

    return DSAttention


@pytest.mark.parametrize("mask", [None, causal_mask(48)], ids=["no mask", "one mask"])
@pytest.mark.parametrize("mode", MODES)
def test_a_client_s_own_forward_is_inside_the_carrier(world, mode, mask):
    plain = gradients(block(config()), mask)
    found = gradients(block(config(**MODES[mode]), own_forward()), mask)
    assert relative(found, plain) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_client_s_own_lookup_is_answered_from_the_carrier(host_attention, mode):
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    client = dict(block_class=own_forward(), core_attention=own_carrier(DSAttention))
    plain = gradients(block(config(), **client))
    assert relative(gradients(block(config(**MODES[mode]), **client)), plain) == 0


def test_a_client_s_own_carrier_is_left_to_it(host_attention, monkeypatch):
    """SkyRL assigns the lookup on the class, for its fix of Megatron-LM #6793."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    current = ContextVar("client_carrier", default=None)
    original = DSAttention._get_index_share_carrier

    def lookup(self, packed_seq_params, attention_mask):
        return current.get() or original(self, packed_seq_params, attention_mask)

    monkeypatch.setattr(DSAttention, "_get_index_share_carrier", lookup)
    plain = gradients(block(config()))
    assert relative(gradients(block(config(**MODES["uniform_1"]))), plain) == 0
    glm5_patch.require()
    glm5_patch.enable()
    assert DSAttention._get_index_share_carrier is lookup


def test_a_seam_that_somebody_replaced_counts_if_it_does_the_job(host_attention, monkeypatch):
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    ours = DSAttention._get_index_share_topk_holder
    monkeypatch.setattr(
        DSAttention, "_get_index_share_topk_holder", lambda self, *args: ours(self, *args)
    )
    row = glm5_patch.status()["index_share_carrier"]
    assert row.state in ("applied", "not_needed")
    block(config(**MODES["uniform_1"]))


def test_a_seam_that_somebody_replaced_wrongly_is_refused(host_attention, monkeypatch):
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    shared = {}
    monkeypatch.setattr(DSAttention, "_get_index_share_topk_holder", lambda *_: shared)
    with pytest.raises(GLM5PatchError, match="gives two forwards one holder"):
        block(config())


def test_a_subclass_that_shares_between_forwards_is_refused_under_recompute(host_attention):
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

    class Shares(DSAttention):
        held = {}

        def _get_index_share_topk_holder(self, *args):
            return self.held

    block(config(), core_attention=Shares)
    with pytest.raises(GLM5PatchError, match="two forwards one holder.*recompute_granularity=None"):
        block(config(**MODES["uniform_1"]), core_attention=Shares)


def test_an_adapter_that_the_host_never_calls_is_refused(host_attention, monkeypatch):
    stack = block(config())
    gradients(stack)
    adapt(stack, "linear_proj")
    gradients(stack)
    adapt(stack, "linear_kv_up_proj")
    with pytest.raises(GLM5PatchError, match="adapter on linear_kv_up_proj.*=plugin"):
        gradients(stack)
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "plugin")
    stack = block(config())
    adapt(stack, "linear_kv_up_proj")
    gradients(stack)
    assert all(p.grad.any() for n, p in stack.named_parameters() if "kv_up_proj.lora_b" in n)


@pytest.mark.parametrize("opens", [True, False])
def test_a_client_s_own_call_counts_if_it_opens_a_carrier(world, monkeypatch, opens):
    from megatron.core.transformer.transformer_block import TransformerBlock

    ours = TransformerBlock.__call__
    plain = torch.nn.Module.__call__
    monkeypatch.setattr(
        TransformerBlock,
        "__call__",
        lambda self, *a, **k: (ours if opens else plain)(self, *a, **k),
    )
    if opens:
        block(config())
    else:
        with pytest.raises(GLM5PatchError, match="opens no top-k carrier"):
            block(config())


class OwnAttention(torch.nn.Module):
    """As slime's and miles': attention and indexer in one module; a skip layer has no indexer."""

    def __init__(self, config, layer_number, **_):
        super().__init__()
        self.linear_kv_up_proj = torch.nn.Linear(8, 8)
        if layer_number < 4:
            self.wq_b = torch.nn.Linear(8, 8)


def own_attention():
    """Layers of it, in a configuration that says nothing of sparse attention."""
    spec = config()
    spec.experimental_attention_variant = None
    spec.dsa_is_glm5 = None
    return spec


def build_own_attention():
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
    )
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(self_attention=ModuleSpec(module=OwnAttention)),
    )
    submodules = TransformerBlockSubmodules([layer] * 8)
    return TransformerBlock(own_attention(), submodules, post_layer_norm=False)


def test_a_client_s_own_attention_is_named_and_not_vouched_for(world, monkeypatch, capfd):
    monkeypatch.setattr(announce, "_said", {})
    capfd.readouterr()
    models = [build_own_attention(), build_own_attention()]
    said = [line for line in capfd.readouterr().err.splitlines() if "glm5-patch" in line]
    name = f"{__name__}.OwnAttention"
    assert len(said) == 1 and f"of 8 layers is not the plugin's: {name}" in said[0]
    with pytest.raises(GLM5PatchError, match="is not the plugin's"):
        glm5_patch.require(model=models[0])


def test_each_kind_of_model_gets_a_line_and_require_takes_the_right_one(world, monkeypatch, capfd):
    monkeypatch.setattr(announce, "_said", {})
    capfd.readouterr()
    build_own_attention()
    for _ in range(2):  # two chunks of a pipeline
        model = block(config())
    said = [line for line in capfd.readouterr().err.splitlines() if "attention of 8" in line]
    assert ["not the plugin's" in line for line in said] == [True, False]
    assert list(announce.built_models().values()) == [False, True]
    glm5_patch.require(model=model)
    with pytest.raises(GLM5PatchError, match="no layer with sparse attention"):
        glm5_patch.require(model=torch.nn.Linear(2, 2))


def applied_seams():
    """Owner, name and patch of each function that a patch wraps on this host."""
    rows = glm5_patch.status()
    for patch in table.PATCHES:
        if rows[patch.id].state != "applied":
            continue
        owner = sys.modules[patch.module]
        *parts, name = patch.attribute.split(".")
        for part in parts:
            owner = getattr(owner, part)
        if isinstance(vars(owner).get(name), FunctionType):
            yield owner, name, patch


def wrapped_plainly(function):
    """As clients wrap that know nothing of ``functools.wraps``."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def test_every_seam_may_be_wrapped_by_a_client(world, monkeypatch):
    plain = gradients(block(config(**MODES["uniform_1"])))
    seams = list(applied_seams())
    assert {"gate", "dsa_spec", "topk_carrier"} <= {patch.id for _, _, patch in seams}
    for owner, name, _ in seams:
        monkeypatch.setattr(owner, name, wrapped_plainly(vars(owner)[name]))
    glm5_patch.require()
    rows = glm5_patch.status()
    assert {rows[patch.id].state.value for _, _, patch in seams} <= {"applied", "not_needed"}
    assert relative(gradients(block(config(**MODES["uniform_1"]))), plain) == 0


def test_a_seam_whose_wrapper_is_gone_is_refused(world, monkeypatch):
    glm5_patch.require()
    for owner, name, patch in applied_seams():
        if not patch.guards(config()):
            continue
        with monkeypatch.context() as client:
            original = torch.nn.Module.__call__  # what classes inherit that have none of their own
            if name != "__call__":
                original = inspect.unwrap(vars(owner)[name])
            client.setattr(owner, name, wrapped_plainly(original))
            with pytest.raises(GLM5PatchError, match=f"patch '{patch.id}' is not in place"):
                glm5_patch.patches.MACHINE.raise_unless_in_place(config=config())


def test_a_checkpointed_core_is_given_gradients_only_of_what_it_computes_on(world, monkeypatch):
    """verl frees the inputs of a recompute that need a gradient. Those of the indexer are also the
    inputs of projections, whose backward is still to come."""
    from glm5_patch.attention import mla

    checkpoint, given = mla.tensor_parallel.checkpoint, []

    def seen(function, distribute, *inputs):
        given.append([tensor.requires_grad for tensor in inputs])
        return checkpoint(function, distribute, *inputs)

    monkeypatch.setattr(mla.tensor_parallel, "checkpoint", seen)
    gradients(block(config(**MODES["core_attn"])))
    assert given and all(needs == [True, True, True, False, False] for needs in given)
