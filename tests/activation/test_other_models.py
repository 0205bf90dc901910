"""A model that is no GLM-5 is trained to the last bit as without this package."""

import json
from pathlib import Path

import pytest

from glm5_patch.patches.probes.megatron_core import refuses_dsa
from tests.activation.fresh import python

SCRIPT = "import torch\n" + Path(__file__).with_name("train_others.py").read_text()


@pytest.fixture(scope="module")
def runs():
    modes = {
        "with": {},
        "off": {"GLM5_PATCH": "0"},
        "without": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    }
    done = {mode: python(SCRIPT, **env) for mode, env in modes.items()}
    for result in done.values():
        assert result.returncode == 0, result.stderr[-2000:]
    found = {mode: json.loads(result.stdout.splitlines()[-1]) for mode, result in done.items()}
    return found, done["with"].stderr


def test_a_dense_model_is_the_same(runs):
    found, _ = runs
    assert found["with"]["dense"] == found["off"]["dense"] == found["without"]["dense"]


@pytest.mark.skipif(refuses_dsa(), reason="this megatron-core builds no DSA model")
def test_another_dsa_model_is_the_same_and_a_line_says_so(runs):
    found, printed = runs
    assert found["with"]["deepseek"] == found["off"]["deepseek"] == found["without"]["deepseek"]
    assert len(found["without"]["deepseek"]) == 3
    assert printed.count("this DSA model keeps megatron-core's own code") == 1
    assert "dsa_is_glm5=True" in printed


def test_no_field_of_the_host_changes(runs):
    found, _ = runs
    host = found["without"]["fields"]
    assert found["off"]["fields"] == host
    assert {name: found["with"]["fields"][name] for name in host} == host
    assert all(name.startswith("dsa_") for name in found["with"]["fields"].keys() - host.keys())
