"""The tests that touch a host, on every release of it, each in a folder of its own.

    python -m tests.hosts.matrix [--record] INTERPRETER=HOST[,HOST...] ...

A HOST is PACKAGE==RELEASE, or several of them joined by +, the first of which is tested.
INTERPRETER is the python of an environment that has torch and the test dependencies. A release that
can't be installed counts as a failure. Hosts are tested two at a time, so the one that takes the
longest comes first. Prints when each begins and ends, and a table at the end. With --record it
measures each host instead (tests/hosts/figures.py) and writes docs/hosts.json and the tables that
are made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARITY = ["tests/patches/test_parity.py", "tests/patches/test_config_fields.py", "tests/hosts"]
TESTS = {
    "megatron-core": PARITY,
    "transformers": ["tests/patches/test_hf_config.py", "tests/hosts/test_tables.py"],
    "megatron-bridge": ["tests/hosts/bridge"],
    "mcore-bridge": ["tests/clients/test_mcore_bridge.py"],
    "verl": ["tests/clients/rl/test_verl.py"],
    # transformers 5.12 has no other row.
    "megatron-bridge==0.5.1+megatron-core==0.18.2+transformers==5.12.1": [
        "tests/hosts/bridge",
        "tests/patches/test_hf_config.py",
    ],
    # It has too little of GLM-5 to be patched.
    "megatron-core==0.16.0rc0.dev132713": ["tests/activation/test_unsupported.py"],
    # The README's command runs the whole suite on 0.16.1; 0.18 has another checkpoint and schedule.
    "megatron-core==0.18.2": [
        *PARITY,
        "tests/patches/test_recompute.py",
        "tests/patches/test_frozen.py",
        "tests/patches/test_mask.py",
        "tests/patches/test_padding.py",
        "tests/patches/test_indexer_loss_scale.py",
        "tests/training/test_served.py::test_gradients_are_the_mean_of_those_of_each_layer",
        "tests/clients/test_launcher.py",
    ],
    # 0.19 shares top-k by itself, and differs in everything that touches it. What reads files or
    # stand-ins alone is the same on every core.
    "megatron-core==0.19.2": [
        "tests/patches",
        "--ignore-glob=tests/patches/test_hf_*.py",
        "--ignore=tests/patches/test_probes.py",
        "--ignore=tests/patches/test_table.py",
        "tests/patching/test_seams.py",
        "tests/hosts",
        "tests/attention",
        "tests/clients/hybrid/test_hybrid_model.py",
        "tests/clients/test_stand_ins.py",
        "tests/clients/test_launcher.py",
        "tests/training/test_served.py::test_gradients_are_the_mean_of_those_of_each_layer",
        "tests/ops/test_index_loss.py::test_only_a_positive_coefficient_trains_the_indexers_and_only_them",
        "tests/ops/test_triton.py::test_a_model_on_the_kernels_equals_one_on_torch",
        "tests/activation/test_faults.py",
        "tests/activation/test_orders.py",
        "tests/activation/test_other_models.py",
        "tests/distributed",
    ],
}
AT_ONCE = 2
"""Hosts; each runs its tests in one process, so that what is imported is imported once."""
PARALLEL = ("0.16.1", "0.18.2", "0.19.2")
# transformers brings tokenizers of the version it insists on; megatron-core's needs are all there.
# Bridge's needs are in tests/hosts/bridge/requirements.txt.
# mcore-bridge's are packages for downloads, which its test does without, and those that are there.
PIP_OPTIONS = {
    "megatron-core": ["--no-deps"],
    "megatron-bridge": ["--no-deps"],
    "mcore-bridge": ["--no-deps"],
    "verl": ["--no-deps"],
    "transformers": [],
}
IMPORTS = {
    "transformers": "import transformers.models.glm_moe_dsa.configuration_glm_moe_dsa",
    "megatron-bridge": """
from tests.hosts.bridge import standin
standin.install()
import megatron.bridge.models.conversion.auto_bridge
import megatron.bridge.models.glm_moe_dsa.glm5_bridge, megatron.bridge.peft.utils
""",
}
STATES = """
import json, torch, glm5_patch
{imports}
rows = [r for r in glm5_patch.status() if r.seam.startswith("{package}.")]
print(json.dumps({{"states": {{r.id: [r.state.value, r.reason] for r in rows}}}}))
"""


class HostFailed(Exception):
    """A release could not be installed or measured."""


class Host:
    """Releases in folders of their own, in front of an environment's packages."""

    def __init__(self, python: str, requirement: str, folder: str):
        self.python = os.path.abspath(python)
        self.requirement = requirement
        self.package, _, self.release = requirement.partition("+")[0].partition("==")
        self.folders = {
            one: os.path.join(folder, one.partition("==")[0]) for one in requirement.split("+")
        }
        self.folder = folder

    def install(self) -> None:
        for one, folder in self.folders.items():
            options = ["-q", "--no-compile", "--target", folder]
            options += PIP_OPTIONS[one.partition("==")[0]]
            done = subprocess.run([self.python, "-m", "pip", "install", *options, one])
            if done.returncode:
                raise HostFailed(f"{one} can't be installed")

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.python, *arguments],
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        """megatron-core 0.17 and later compile a C++ extension with ninja while they recompute; a
        build folder of its own keeps a lock that a killed process left from blocking this one."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self.folders.values()),
            "PATH": os.pathsep.join((os.path.dirname(self.python), os.environ["PATH"])),
            "TORCH_EXTENSIONS_DIR": os.path.join(self.folder, "torch_extensions"),
            "OMP_NUM_THREADS": "1",
        }


def test(host: Host) -> dict[str, int]:
    """The counts of pytest's last line."""
    tests = TESTS.get(host.requirement, TESTS[host.package])
    result = host.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    lines = result.stdout.strip().splitlines() or [""]
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])
    counts = {kind: int(n) for n, kind in found}
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print(f"    {host.requirement}: {line[:200]}")
    if result.returncode and not counts.get("failed"):
        print(result.stdout[-2000:], result.stderr[-2000:])
        counts["failed"] = counts.get("error", 1)
    return counts


def measure(host: Host) -> dict:
    """What the plugin does there, and for a core how right it is with and without."""
    if host.package in IMPORTS:
        package = host.package.replace("-", ".")
        code = STATES.format(imports=IMPORTS[host.package], package=package)
        return _printed(host.run("-c", code))
    patched = _printed(host.run("-m", "tests.hosts.figures"))
    released = _printed(host.run("-m", "tests.hosts.figures", "--released"))
    found = {**patched, "released": released["figures"]}
    if host.release in PARALLEL:
        found["parallel"] = _printed(host.run("-m", "tests.distributed.run"))
    return found


def _printed(result: subprocess.CompletedProcess) -> dict:
    if result.returncode:
        raise HostFailed(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def on_each(requested: list[tuple[str, str]], action: Callable[[Host], dict]) -> dict[str, dict]:
    """Act on every host, two at a time; one that fails has {"failed": 1}."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        hosts = [
            Host(python, requirement, os.path.join(folder, str(number)))
            for number, (python, requirement) in enumerate(requested)
        ]
        results = pool.map(lambda host: _on_one(host, action), hosts)
        return {host.requirement: result for host, result in zip(hosts, results)}


def _on_one(host: Host, action: Callable[[Host], dict]) -> dict:
    print(f"{host.requirement}: begins", flush=True)
    start = time.perf_counter()
    try:
        host.install()
        result = action(host)
    except HostFailed as error:
        print("   ", error)
        result = {"failed": 1}
    shutil.rmtree(host.folder, ignore_errors=True)
    print(f"{host.requirement}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def print_counts(table: dict[str, dict[str, int]]) -> bool:
    """Whether everything passed."""
    columns = ("passed", "failed", "skipped")
    width = max(map(len, table))
    print(f"\n{'host':{width}}", *(f"{column:>8}" for column in columns))
    for requirement, counts in table.items():
        print(f"{requirement:{width}}", *(f"{counts.get(column, 0):8}" for column in columns))
    passed, failed = (sum(c.get(k, 0) for c in table.values()) for k in ("passed", "failed"))
    print(f"hosts: {passed} passed, {failed} failed")
    return passed > 0 and not failed


def keep_record(table: dict[str, dict]) -> None:
    from tests.hosts import tables

    packages = ["megatron-core", *IMPORTS]
    record: dict = {"date": date.today().isoformat(), **{package: {} for package in packages}}
    record |= tables.read_clients()
    for requirement, found in table.items():
        package, _, release = requirement.partition("+")[0].partition("==")
        record[package][release] = found
    tables.write(record)


def hosts_of(arguments: list[str]) -> list[tuple[str, str]]:
    """Of "python=a==1,b==2" the pairs (python, "a==1") and (python, "b==2")."""
    pairs = (argument.split("=", 1) for argument in arguments)
    return [(python, one) for python, several in pairs for one in several.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("hosts", nargs="+", metavar="INTERPRETER=PACKAGE==RELEASE,...")
    options = parser.parse_args()
    table = on_each(hosts_of(options.hosts), measure if options.record else test)
    if not options.record:
        return 0 if print_counts(table) else 1
    failed = [requirement for requirement, found in table.items() if "failed" in found]
    if failed:
        print(f"nothing is written: {failed} failed")
        return 1
    keep_record(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
