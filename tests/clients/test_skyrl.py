"""SkyRL assigns ``DSAttention._get_index_share_carrier``: that stays, and recompute is right.

Its module is taken by path, because the packages around it import Ray. On megatron-core 0.20 its
whole patch runs, which also rewrites ``checkpointed_forward``. It refuses the text of that function
in 0.19; there the lookup alone is assigned.
"""

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest

import glm5_patch
from tests.clients.stacks import MODES, block, causal_mask, config, gradients
from tests.tiny import relative

PATH = "backends/skyrl_train/patches/megatron/patch_dsa_index_share.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("skyrl") is None, reason="SkyRL is not installed"
)


@pytest.fixture
def dsa(host_attention, monkeypatch):
    """The host's module after SkyRL's patch of it."""
    from megatron.core.transformer.experimental_attention_variant import dsa

    skyrl = _module(monkeypatch)
    original = dsa.DSAttention._get_index_share_carrier
    monkeypatch.setattr(dsa.DSAttention, "_get_index_share_carrier", original)
    _keep_recompute(monkeypatch)
    if not skyrl.patch_dsa_index_share():
        lookup = skyrl._make_index_share_carrier_getter(original)
        dsa.DSAttention._get_index_share_carrier = lookup
    return dsa


def _module(monkeypatch) -> ModuleType:
    if importlib.util.find_spec("loguru") is None:
        loguru = ModuleType("loguru")
        loguru.logger = MagicMock()
        monkeypatch.setitem(sys.modules, "loguru", loguru)
    (folder,) = importlib.util.find_spec("skyrl").submodule_search_locations
    spec = importlib.util.spec_from_file_location("skyrl_index_share", f"{folder}/{PATH}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _keep_recompute(monkeypatch) -> None:
    """Put back afterwards what SkyRL's patch rebinds."""
    from megatron.core import recompute
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer import transformer_block

    for module in (recompute, hybrid_block, transformer_block):
        monkeypatch.setattr(module, "checkpointed_forward", module.checkpointed_forward)


@pytest.mark.parametrize("mask", [None, causal_mask(48)], ids=["no mask", "one mask"])
def test_recompute_gives_the_gradients_of_no_recompute(dsa, mask):
    plain = gradients(block(config()), mask)
    for changes in MODES.values():
        assert relative(gradients(block(config(**changes)), mask), plain) == 0


def test_its_assignment_is_accepted_and_stays(dsa):
    assigned = dsa.DSAttention._get_index_share_carrier
    assert assigned.__module__ == "skyrl_index_share"
    glm5_patch.require(model=block(config(**MODES["uniform_1"])))
    glm5_patch.enable()
    assert dsa.DSAttention._get_index_share_carrier is assigned
