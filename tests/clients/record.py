"""Run a client's tests and keep what was seen in docs/clients.json and the page made from it.

    python -m tests.clients.record CLIENT TESTS...

CLIENT is its name and version. The environment decides which megatron-core and which client run:
one of each on PYTHONPATH, ``MEGATRON_LM`` for a source tree. Nothing is kept if a test fails or all
are skipped.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

from glm5_patch.patches.table import PATCHES
from tests.hosts import tables


def main(client: str, tests: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tables.ROOT)
    print(result.stdout)
    passed = re.search(r"(\d+) passed", result.stdout)
    if result.returncode or passed is None:
        print("nothing is kept")
        return 1
    import megatron.core

    core = megatron.core.__version__
    record = tables.read()
    launcher = client.partition(" ")[0] == "Megatron-LM"
    source = "MEGATRON_LM=SOURCE " if "MEGATRON_LM" in os.environ else ""
    row = {
        "client": client,
        "core": core,
        "command": f"{source}pytest {shlex.join(tests)}",
        "seen": f"{_what(tests[0])} {passed[0]}",
        "date": date.today().isoformat(),
    }
    others = [r for r in record["clients"] if (r["client"], r["core"]) != (client, core)]
    record["clients"] = sorted([*others, row], key=lambda r: (r["client"], r["core"]))
    if launcher:
        record["megatron-lm"][core] = {"states": _states()}
    tables.write(record)
    return 0


def _what(test: str) -> str:
    """The first sentence of a test file."""
    text = ast.get_docstring(ast.parse((tables.ROOT / Path(test.partition("::")[0])).read_text()))
    return text.partition("\n\n")[0].replace("\n", " ")


def _states() -> dict[str, list[str]]:
    """Of the launcher's patches, whose modules the tests imported in processes of their own."""
    import glm5_patch

    sys.path.append(os.environ["MEGATRON_LM"])
    own = [patch for patch in PATCHES if patch.distribution == "megatron-lm"]
    for patch in own:
        import_module(patch.module)
    status = glm5_patch.status()
    return {patch.id: [status[patch.id].state.value, status[patch.id].reason] for patch in own}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
