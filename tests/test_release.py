"""What goes out: the workflow that releases, and the examples for containers and clusters."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import yaml

import glm5_patch
from glm5_patch.tools import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WHEEL = f"glm5_patch-{glm5_patch.__version__}-py3-none-any.whl"


def test_every_action_is_pinned_by_its_commit():
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        used = re.findall(r"uses: *(.*)", workflow.read_text())
        assert used
        for action in used:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_a_release_is_attested_and_says_what_is_in_it():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert "cyclonedx-py" in str(jobs["build"]["steps"])
    (publish,) = (step for step in jobs["publish"]["steps"] if "pypi-publish" in step["uses"])
    assert publish["with"]["attestations"] is True
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_the_layer_of_a_container():
    text = (EXAMPLES / "Dockerfile").read_text()
    assert f"```dockerfile\n{text}```" in (ROOT / "docs" / "install.md").read_text()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["FROM", "COPY", "RUN", "ENV", "RUN"]
    assert re.fullmatch(r"FROM nvcr\.io/nvidia/\w+:\d\d\.\d\d", lines[0])
    assert fnmatch(WHEEL, re.search(r"COPY dist/(\S+) ", text)[1])


def test_scripts_for_slurm_are_bash():
    scripts = list(EXAMPLES.glob("*.sbatch"))
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert "\n#SBATCH " in script.read_text()
    assert scripts


def test_the_split_of_the_script_for_slurm_is_the_first_plan(capsys):
    text = (EXAMPLES / "slurm.sbatch").read_text()
    config = str(ROOT / "tests" / "configs" / "glm-5.2.json")
    flags = {}
    for command in re.findall(r"`glm5-patch (plan [^`]*)`", text.replace("\n# ", " ")):
        assert cli.main([*command.replace("CONFIG_DIR", config).split(), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        flags |= (found.get("splits") or found["plans"])[0]["megatron_flags"]
    (layout,) = re.findall("^layout='(.*)'$", text, re.M)
    assert flags.pop("--pipeline-model-parallel-layout") == layout
    for name, value in flags.items():
        assert f" {name} " in text if value is True else f" {name} {value} " in text


def test_the_environment_of_ray_workers():
    environment = yaml.safe_load((EXAMPLES / "ray_runtime_env.yaml").read_text())
    assert set(environment) == {"pip", "env_vars"}
    assert [Path(wheel).name for wheel in environment["pip"]] == [WHEEL]
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
