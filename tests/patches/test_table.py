import importlib
from pathlib import Path

import pytest

from glm5_patch.patches import MODULES
from glm5_patch.patches.table import PATCHES
from glm5_patch.patching.patch import Patch

FOLDER = Path(importlib.import_module("glm5_patch.patches").__file__).parent


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.id)
def test_every_record_is_filled_in(patch):
    for name in ("id", "module", "attribute", "why", "upstream", "remove_when"):
        assert getattr(patch, name).strip(), f"{patch.id}: {name} is blank"
    assert patch.why.endswith(".")
    assert "\n" not in patch.why


def test_ids_and_seams_are_unique():
    for values in ([p.id for p in PATCHES], [p.seam for p in PATCHES]):
        assert len(values) == len(set(values))


def test_the_table_is_complete():
    """Every patch file of the package is in the table, once, and each module in the list."""
    assert set(MODULES) == {patch.module for patch in PATCHES}
    for path in FOLDER.rglob("*/*.py"):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        importlib.import_module(".".join(["glm5_patch.patches", *parts]))
    ours = {p for p in Patch.__subclasses__() if p.__module__.startswith("glm5_patch.")}
    assert {type(p) for p in PATCHES} == ours


def test_paths_mirror_the_hosts():
    for patch in PATCHES:
        folder = type(patch).__module__.split(".")[2]
        assert patch.module.replace(".", "_").startswith(folder)


def test_the_documents_list_every_patch_with_its_reason():
    page = (FOLDER.parents[1] / "docs" / "patches.md").read_text()
    for patch in PATCHES:
        assert f"| `{patch.id}` | `{patch.attribute}` | {patch.why} |" in page
