"""A pipeline stage sends its output, and not what the memory is used for after it."""

import pytest

import glm5_patch
from tests.distributed import run


def test_an_output_arrives_though_it_is_freed_while_it_is_sent(tmp_path):
    pytest.importorskip("megatron.core")
    glm5_patch.require()
    row = glm5_patch.status()["pipeline_sends"]
    if row.state == "not_needed":
        import megatron.core

        pytest.skip(f"megatron-core {megatron.core.__version__}: {row.reason}")
    assert run.world(2, tmp_path, "tests.distributed.sending") == [[True] * 4] * 2
