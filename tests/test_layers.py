"""The folders import only downward, as pyproject.toml states it for import-linter."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"


def test_every_contract_is_kept():
    done = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_and_folders_stay_small():
    kernels = {"triton.py", "gluon.py"}
    for path in (ROOT / "glm5_patch").rglob("*.py"):
        if path.name not in kernels:
            assert len(path.read_text().splitlines()) <= 400, path
    for folder in (ROOT / "glm5_patch").rglob("*/"):
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 12, folder
