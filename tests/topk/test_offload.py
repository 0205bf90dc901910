"""Top-k that wait for their backward in host memory: the same gradients, bit for bit."""

import gc
import weakref

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches.announce import describe
from glm5_patch.patches.megatron_core.building.dsa_spec import attention_stack
from glm5_patch.topk.carrier import carried, open_carrier
from glm5_patch.topk.offload import HostMemory
from tests.patches.test_recompute import MODES, gradients, microbatches
from tests.tiny import megatron_config, megatron_model, saved
from tests.topk.test_carrier import SCHEDULE, topk

ON = dict(dsa_topk_offload=True)


def test_one_layer_is_on_the_device_and_then_the_one_before():
    memory = HostMemory()
    for layer_number in (1, 4, 7):
        memory.put(layer_number, topk(layer_number))
    for layer_number, before in ((7, 4), (4, 1), (1, 1)):
        for _ in range(2):
            assert torch.equal(memory.take(layer_number), topk(layer_number))
            assert list(memory._arriving) == [layer_number]
        memory.fetch_before(layer_number)
        assert list(memory._arriving) == [before]
        arrived = memory._arriving[before].topk_indices
        assert memory.take(before).data_ptr() == arrived.data_ptr()
    assert torch.equal(memory.take(7), topk(7))  # a second backward


def test_what_only_recomputes_read_leaves_the_device():
    with open_carrier() as carrier:
        carrier.host_memory = HostMemory()
        keys = topk(1)
        of_device = weakref.ref(keys)
        carried(lambda keys=keys: carrier.publish(1, keys, SCHEDULE))()
        readers = [carried(lambda n=n: carrier.read(n, 1)) for n in (2, 3)]
        assert readers[0]().data_ptr() == keys.data_ptr()  # no copy while the forward reads it
        assert readers[1]().data_ptr() == keys.data_ptr()
        del keys
        gc.collect()
        assert of_device() is None
    for read in reversed(readers):
        assert torch.equal(read(), topk(1))
    assert torch.equal(carrier.published(1), topk(1))


def test_what_later_stages_read_leaves_the_device_at_the_end_of_the_forward():
    with open_carrier() as carrier:
        carrier.host_memory = HostMemory()
        carried(lambda: carrier.publish(1, topk(1), SCHEDULE))()
        carried(lambda: carrier.read(2, 1))()  # layer 3 is on the next stage
        assert carrier._slots[1].kept is not None
        carrier.end_forward()
    assert carrier._slots[1].kept is None
    assert torch.equal(carrier.published(1), topk(1))


def test_a_top_k_of_multi_token_prediction_stays():
    with open_carrier() as carrier:
        carrier.host_memory, carrier.is_of_mtp = HostMemory(), True
        carried(lambda: carrier.publish(1, topk(1), None))()
    assert carrier._slots[1].kept is not None


@pytest.fixture(scope="module")
def checkpoint(world, our_core, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("offload") / "hf")


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        ("uniform_1", "thd"),
        ("core_attn", "bshd"),
        *(
            pytest.param(mode, layout, marks=pytest.mark.nightly)
            for mode in ("uniform_1", "uniform_4", "block_3", "core_attn")
            for layout in ("bshd", "thd", "mask", "reused")
        ),
    ],
)
def test_two_microbatches_in_flight(checkpoint, monkeypatch, mode, layout):
    """Forward, forward, backward, backward, of different data; the trunk's first layers frozen."""
    put, put_away = HostMemory.put, []
    monkeypatch.setattr(
        HostMemory, "put", lambda memory, n, keys: put_away.append(n) or put(memory, n, keys)
    )
    found = []
    for settings in ({}, ON):
        model = megatron_model(checkpoint, dsa_indexer_loss_coeff=0.1, **MODES[mode], **settings)
        model.embedding.requires_grad_(False)
        model.decoder.layers[0].requires_grad_(False)
        found.append(gradients(model, microbatches(layout, 0)))
    on_the_device, on_the_host = found
    assert on_the_device.keys() == on_the_host.keys()
    assert all(torch.equal(on_the_host[n], g) for n, g in on_the_device.items())
    assert put_away == [1, 2, 3, 7] * 2 or mode == "block_3"
    assert put_away


def test_the_line_of_a_model_says_so(checkpoint):
    says = "; top-k wait for their backward in host memory"
    assert describe(megatron_model(checkpoint, **MODES["uniform_1"], **ON).config).endswith(says)
    assert says not in describe(megatron_model(checkpoint, **MODES["uniform_1"]).config)


def test_the_hosts_attention_does_not_offload(checkpoint, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "host")
    config = megatron_config(checkpoint.config, **MODES["uniform_1"], **ON)
    with pytest.raises(GLM5PatchError, match="dsa_topk_offload=True with .*host.*set it to plugin"):
        attention_stack(config, wrong=None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "recompute_granularity=None .*: no top-k is kept"),
        (MODES["mla_up_proj"], r".*recompute_modules=\['mla_up_proj'\]: no top-k is kept"),
        (
            dict(MODES["uniform_1"], dsa_training_phase="dense_warmup", dsa_indexer_loss_coeff=0.1),
            "dsa_training_phase='dense_warmup': a dense warm-up selects no keys",
        ),
    ],
    ids=str,
)
def test_where_nothing_waits_it_is_refused(checkpoint, settings, says):
    with pytest.raises(GLM5PatchError, match=f"dsa_topk_offload=True with {says}.*=False"):
        megatron_model(checkpoint, **settings, **ON)
