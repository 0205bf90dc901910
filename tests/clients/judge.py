"""Judge a program's GLM-5, and keep what was said in docs/clients.json and the page made from it.

    python -m tests.clients.judge NAME TARGET [--released] [--flavour 5.1]

NAME is the program and its version, and TARGET is what ``glm5-patch verify --model`` takes. The
environment decides which hosts and which program run. ``--released`` switches off every patch but
those that make megatron-core run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import date
from importlib.util import find_spec

from glm5_patch.patches.table import PATCHES
from tests.hosts import tables
from tests.hosts.figures import RUNS_HERE


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("target")
    parser.add_argument("--released", action="store_true")
    parser.add_argument("--flavour", default="5.2")
    options = parser.parse_args()
    env = dict(os.environ)
    if options.released:
        env["GLM5_PATCH_DISABLE"] = ",".join(p.id for p in PATCHES if p.id not in RUNS_HERE)
    command = ["verify", "--model", options.target, "--flavour", options.flavour]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "glm5_patch", *command, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tables.ROOT,
        env=env,
    )
    found = json.loads(result.stdout)
    said = without_place(found["error"]) if "error" in found else tables.said_of(found)
    print(said)
    record = tables.read()
    row = {
        "program": options.name,
        "hosts": hosts(),
        "flavour": options.flavour,
        "target": options.target + (" --released" if options.released else ""),
        "said": said,
        "date": date.today().isoformat(),
    }
    key = lambda row: (row["program"], row["hosts"], row["target"])
    others = [one for one in record["judged"] if key(one) != key(row)]
    record["judged"] = sorted([*others, row], key=key)
    tables.write(record)
    return 0


def without_place(error: str) -> str:
    """An error without the files that it came from."""
    return re.sub(r" \([^()]*:\d+\)$", "", error)


def hosts() -> str:
    import transformers

    versions = [f"transformers {transformers.__version__}"]
    if find_spec("megatron") is not None:
        import megatron.core

        versions.insert(0, f"megatron-core {megatron.core.__version__}")
    return ", ".join(versions)


if __name__ == "__main__":
    sys.exit(main())
