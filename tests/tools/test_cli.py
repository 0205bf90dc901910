"""Each command where all is well, switched off, half broken and unsupported."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from glm5_patch.patches.table import PATCHES
from tests.activation.fresh import environment, of_this_host, output

ROOT = Path(__file__).parents[2]
BREAK_HOST = """
import importlib.abc, importlib.machinery, sys
class Break(importlib.abc.MetaPathFinder):
    '''Renames one seam of the host as soon as its module is there.'''
    name = "megatron.core.transformer.transformer_block"
    def find_spec(self, name, path, target=None):
        if name != self.name: return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.TransformerBlock.build = module.TransformerBlock.__dict__["__call__"]
            del module.TransformerBlock.__call__
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Break())
"""


def command(*arguments, python=sys.executable, cwd=ROOT, **env):
    return subprocess.run(
        [python, "-W", "ignore", "-m", "glm5_patch", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**env),
    )


@pytest.fixture
def broken_host(tmp_path):
    """Variables under which the host has lost a seam."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_HOST)
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture
def bare(tmp_path):
    """An environment with this package and what it depends on, and no host."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    (site,) = (tmp_path / "v").glob("lib/python*/site-packages")
    for name in ("wrapt", "importlib-metadata", "zipp"):
        for top in {Path(str(file)).parts[0] for file in distribution(name).files}:
            if top not in ("..", "__pycache__"):
                (site / top).symlink_to(distribution(name).locate_file(top))
    (site / "glm5_patch").symlink_to(ROOT / "glm5_patch")
    return dict(python=str(tmp_path / "v" / "bin" / "python"), cwd=tmp_path, PYTHONPATH="")


def findings(result) -> dict[str, dict]:
    return {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}


def test_doctor_finds_a_healthy_installation_healthy():
    result = command("doctor", "--json")
    found = findings(result)
    assert {patch.id for patch in PATCHES if of_this_host(patch)} < found.keys()
    # This test runs from a source tree, which need not be what is installed.
    wrong = [f for f in found.values() if not f["ok"] and f["what"] != "distribution"]
    assert wrong == []


@pytest.mark.parametrize(
    "env, what, remedy",
    [
        ({"GLM5_PATCH": "0"}, "switches", "unset GLM5_PATCH"),
        pytest.param(
            {"GLM5_PATCH_DISABLE": "gate"},
            "gate",
            "without it: A model is built and trained wrongly",
            marks=pytest.mark.nightly,
        ),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "torch's autoload", "import glm5_patch.auto"),
    ],
)
def test_doctor_names_what_is_switched_off(env, what, remedy):
    result = command("doctor", "--json", **env)
    finding = findings(result)[what]
    assert result.returncode == 1
    assert not finding["ok"] and remedy in finding["remedy"]


def test_doctor_names_a_seam_that_the_host_has_lost(broken_host):
    result = command("doctor", "--json", **broken_host)
    finding = findings(result)["topk_carrier"]
    assert result.returncode == 1
    assert not finding["ok"] and "no attribute '__call__'" in finding["seen"]


@pytest.mark.nightly
def test_status_names_a_seam_that_the_host_has_lost(broken_host):
    result = command("status", "--import", **broken_host)
    assert result.returncode == 1
    assert "patch 'topk_carrier' is not in place" in result.stderr


@pytest.mark.nightly
def test_doctor_names_a_field_that_no_command_line_can_be_made_of():
    code = """
        import torch
        from megatron.core.transformer.transformer_config import TransformerConfig
        from glm5_patch.tools.doctor import probe
        for kind in (int, "int"):
            TransformerConfig.__dataclass_fields__["dsa_indexer_topk_freq"].type = kind
            (found,) = [f for f in probe() if f.what == "command line of Megatron-LM"]
            print(found.ok, found.seen)
    """
    right, wrong = output(code).splitlines()
    assert right == "True every dsa_ field is an argument"
    assert wrong == "False the type of dsa_indexer_topk_freq is the string 'int'"


@pytest.mark.nightly  # the others find what doctor says of a host
def test_doctor_names_two_cores_on_the_path(tmp_path):
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)])
    found = findings(command("doctor", "--json", PYTHONPATH=path))
    assert not found["megatron-core on the path"]["ok"]
    assert str(tmp_path) in found["megatron-core on the path"]["seen"]


@pytest.mark.parametrize(
    "arguments",
    [["doctor"], ["status", "--import"], ["verify"], ["demo"]],
)
def test_without_torch_commands_say_so(bare, arguments):
    result = command(*arguments, **bare)
    assert result.returncode == 2
    assert "torch" in result.stderr and "Traceback" not in result.stderr


def test_status_imports_nothing_and_says_what_is_there(bare):
    """Neither torch nor a host is in this environment."""
    result = command("status", "--json", **bare, GLM5_PATCH_DISABLE="gate")
    found = json.loads(result.stdout)
    assert result.returncode == 1 and not found["healthy"]  # no entry point, and a switch is set
    assert found["versions"]["torch"] == "not installed"
    rows = {row["id"]: row for row in found["patches"]}
    assert rows.keys() == {patch.id for patch in PATCHES}
    assert {row["target"] for row in rows.values()} == {"not installed"}
    assert [i for i, row in rows.items() if row["state"] == "disabled"] == ["gate"]
    assert "status --import" in command("status", **bare).stdout


def test_status_finds_targets_without_importing_them():
    code = (
        "import sys; from glm5_patch.tools import cli; code = cli.main(['status', '--json'])\n"
        "assert not {'torch', 'megatron.core', 'transformers', 'wrapt'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["patches"]
    there = {row["id"] for row in rows if row["target"] == "there"}
    assert {patch.id for patch in PATCHES if of_this_host(patch)} <= there


def test_explain_and_env_need_no_host(bare):
    result = command("explain", "gate", **bare)
    assert result.returncode == 0 and "TransformerBlock.__init__" in result.stdout
    assert "megatron-core: patched on 0.16.0" in result.stdout
    assert len(json.loads(command("explain", "--json", **bare).stdout)) == len(PATCHES)
    result = command("env", "--json", **bare, GLM5_PATCH_LOG="debug")
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == "not installed"
    assert found["environment"] == {"GLM5_PATCH_LOG": "debug"}


def test_explain_refuses_an_unknown_patch():
    result = command("explain", "gaet")
    assert result.returncode == 2 and "no patch is called 'gaet'; there are" in result.stderr


def test_verify_fails_where_a_patch_is_missing():
    result = command("verify", GLM5_PATCH_DISABLE="topk_carrier")
    assert result.returncode == 2
    assert "patch 'topk_carrier' is not in place" in result.stderr


def test_building_a_model_says_once_what_it_was_built_with(world, tmp_path, capfd, monkeypatch):
    from glm5_patch.patches import announce
    from tests.tiny import megatron_model, saved

    monkeypatch.setattr(announce, "_said", {})
    checkpoint = saved(tmp_path)
    capfd.readouterr()
    for _ in range(2):
        megatron_model(checkpoint)
    lines = [line for line in capfd.readouterr().err.splitlines() if "a GLM-5 on" in line]
    assert len(lines) == 1
    assert "4 of 8 layers compute their top-k" in lines[0] and "patches applied" in lines[0]
    assert "sparse attention by" in lines[0]
