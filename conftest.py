"""Shared fixtures. The plugin is active in this process: importing torch loads it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

# Tiny tensors: threads would only wait for each other, here and in child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles one function of megatron-core's router, 5 to 11 s in each process. The test of
# `glm5-patch verify` leaves it on.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Triton reads it when it is imported, which a host may do.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

warnings.filterwarnings(
    "ignore", message=".*(Apex|Transformer Engine|cuda_graph_scope|core_attn is from).*"
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share a fixture of their module run in one worker, which makes it once."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(one.scope == "module" for definitions in fixtures for one in definitions):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # a worker of xdist has one
        # With -q pytest prints nothing until the first test ends; importing torch takes seconds.
        print("glm5-patch tests: collecting (torch is imported), then running", flush=True)


@pytest.fixture(autouse=True)
def no_mtp_losses_of_other_tests():
    """megatron-core sums the losses of MTP layers in one tensor of the process, which keeps the
    size that the first model gave it: one with more layers then fails."""
    yield
    module = sys.modules.get("megatron.core.transformer.multi_token_prediction")
    if module is not None:
        module.MTPLossLoggingHelper.tracker.clear()


@pytest.fixture(scope="session")
def world():
    """megatron-core's model parallelism with one rank, on the CPU."""
    from glm5_patch.testing.cpu_host import single_process

    with single_process("cpu"):
        yield


@pytest.fixture(scope="session")
def needs_patch():
    """Called with the id of a patch, skips where megatron-core does its job."""
    import glm5_patch

    def needs(patch_id: str) -> None:
        row = glm5_patch.status()[patch_id]
        if row.state == "not_needed":
            import megatron.core

            pytest.skip(f"megatron-core {megatron.core.__version__} uses its own: {row.reason}")

    return needs


@pytest.fixture(scope="session")
def our_core(world, needs_patch):
    """For tests of ``CrossLayerDSAttention`` itself, which steps back for a right host's own."""
    needs_patch("dsa_spec")
