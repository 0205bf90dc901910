"""A wheel on a path of its own, an editable install, and what uninstalling leaves."""

import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
CODE = f"import torch, {SPECS}, glm5_patch; print(glm5_patch.__file__); print(glm5_patch.status())"


def run(*command, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GLM5", "PYTHONPATH"))}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=os.sep,  # not the source tree, which `-c` would import from
        env={**environment, **env},
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "glm5_patch",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    assert "glm5_patch/py.typed" in names
    assert not any(name.endswith(".pth") for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA")))
    plain = [
        x
        for x in metadata.decode().splitlines()
        if x.startswith("Requires-Dist") and "extra ==" not in x
    ]
    assert sorted(x.split()[1].split("<")[0].split(">")[0] for x in plain) == [
        "importlib-metadata",
        "wrapt",
    ]


@pytest.fixture
def image(tmp_path):
    """An environment that borrows torch and the hosts from this one, without the package:
    (interpreter, folder of packages)."""
    import torch

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    python = str(venv / "bin" / "python")
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    )
    # Everything of this environment but this package.
    lender = Path(torch.__file__).parents[1]
    for entry in lender.iterdir():
        if "glm5_patch" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    host_folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    (site / "hosts.pth").write_text("\n".join(f for f in host_folders if f and f != str(ROOT)))
    return python, site


@pytest.fixture(
    params=[
        "wheel",
        *(pytest.param(how, marks=pytest.mark.nightly) for how in ("editable", "target")),
    ]
)
def installed(request, wheel, image, tmp_path):
    """The package, installed its own way: (how, interpreter, variables, folder of packages)."""
    python, site = image
    pip = [sys.executable, "-m", "pip", "--python", python]
    variables = {}
    if request.param == "target":
        variables["PYTHONPATH"] = str(tmp_path / "target")
        run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            variables["PYTHONPATH"],
            str(wheel),
        )
    else:
        source = [str(wheel)] if request.param == "wheel" else ["-e", str(ROOT)]
        run(*pip, "install", "-q", "--no-deps", *source)
    return request.param, python, variables, site


def test_it_activates_and_uninstalling_leaves_nothing(installed):
    how, python, variables, site = installed
    where, *status = run(python, "-W", "ignore", "-c", CODE, **variables).splitlines()
    assert (Path(where).parents[1] == ROOT) == (how == "editable")
    assert any(line.split()[:2] == ["gate", "applied"] for line in status)
    if how != "target":
        run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "glm5-patch")
        assert not [entry.name for entry in site.iterdir() if "glm5" in entry.name]
        assert not (site.parents[2] / "bin" / "glm5-patch").exists()


@pytest.mark.nightly
def test_the_path_of_a_new_user_takes_a_minute(image, wheel):
    """The commands of docs/install.md, from an image to a passed verify."""
    python, _ = image
    page = (ROOT / "docs" / "install.md").read_text()
    commands = re.findall(r"^\| `(.+)` \| [\d.]+ s \|$", page, re.M)
    started = time.perf_counter()
    for command in commands:
        program, *words = command.replace("links dist", f"links {wheel.parent}").split()
        if program == "pip":
            printed = run(sys.executable, "-m", "pip", "--python", python, *words)
        else:
            printed = run(str(Path(python).parent / program), *words)
    assert len(commands) == 3 and "passed in" in printed
    assert time.perf_counter() - started <= 60


WRAPT_PROXY = """
import importlib.metadata, types, wrapt
from glm5_patch.patching.seams import Seams
host = types.ModuleType("host")
host.function = original = lambda x: x
seams = Seams()
add_one = lambda wrapped, instance, args, kwargs: wrapped(*args) + 1
seams.wrap(host, "function", add_one)
host.function = theirs = wrapt.FunctionWrapper(host.function, add_one)
assert host.function(0) == 2 and seams.lost() is None
seams.undo()
assert host.function is theirs and host.function(0) == 1
seams.wrap(host, "function", add_one)
assert host.function is theirs and host.function(0) == 2 and seams.lost() is None
host.function = lambda x: x
assert seams.lost() == "function"
print(importlib.metadata.version("wrapt"))
"""


@pytest.mark.parametrize(
    "pin", [*(pytest.param(pin, marks=pytest.mark.nightly) for pin in ("1.14", "1.17")), "2.0"]
)
def test_no_pin_of_an_image_is_changed(wheel, tmp_path, pin):
    """Images pin wrapt for OpenTelemetry. Theirs around ours is seen through in each release."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"wrapt=={pin}.*\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "-c", str(constraints), str(wheel))
    assert "No broken requirements" in run(*pip, "check")
    assert run(python, "-c", WRAPT_PROXY).startswith(f"{pin}.")
