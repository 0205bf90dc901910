"""The documents show what was measured, and what was measured still holds on the host at hand."""

import json
from importlib.metadata import version

import pytest
import transformers

import glm5_patch
from tests.hosts import tables

RECORD = tables.read()
CORES = RECORD["megatron-core"]


def test_documents_show_the_record():
    blocks = tables.blocks(RECORD)
    assert {block[1]: tables.shown(*block) for block in blocks} == {
        name: table for (_, name), table in blocks.items()
    }


def test_the_package_says_what_was_recorded():
    assert json.loads(tables.PACKAGED.read_text()) == tables.packaged(RECORD)


def found_here(prefix):
    rows = [row for row in glm5_patch.status() if row.seam.startswith(prefix)]
    assert rows and all(row.state in tables.WORDS for row in rows)
    return {row.id: [row.state.value, row.reason] for row in rows}


def recorded(host, release, found):
    states = RECORD[host][release]["states"]
    return {patch_id: states[patch_id] for patch_id in found}


def test_the_core_at_hand_is_patched_as_recorded():
    core = pytest.importorskip("megatron.core")
    glm5_patch.require()
    found = found_here("megatron.core")
    if core.__version__ not in CORES:
        pytest.skip(f"megatron-core {core.__version__} is not in docs/hosts.json")
    assert found == recorded("megatron-core", core.__version__, found)


def test_the_transformers_at_hand_is_patched_as_recorded():
    transformers.GlmMoeDsaConfig()
    found = found_here("transformers")
    release = version("transformers")
    if release not in RECORD["transformers"]:
        pytest.skip(f"transformers {release} is not in docs/hosts.json")
    assert found == recorded("transformers", release, found)
