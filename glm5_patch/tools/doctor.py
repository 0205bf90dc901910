"""``glm5-patch doctor``: does the plugin work in this installation, and what is the remedy if not?

What can be read without importing torch is read in this process. The rest is done in a second
process, which imports torch and each host module as a program would.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from ..env import ENABLED, KERNELS, Switches, installed_version, kernels, problems
from ..errors import GLM5PatchError
from .report import Result, print_table, say

DISTRIBUTION = "glm5-patch"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_TIMEOUT_S = 300


class Finding(NamedTuple):
    """The result of one check."""

    what: str
    ok: bool
    seen: str
    remedy: str = ""


def run() -> Result:
    """Check the whole installation.

    Raises:
        GLM5PatchError: torch does not import here, so the checks can't run.
    """
    say(
        "glm5-patch doctor: reading the installation, then importing torch and the hosts in a "
        "second process"
    )
    findings = list(installation())
    findings += [Finding(**finding) for finding in _in_a_second_process()]
    healthy = all(finding.ok for finding in findings)

    def show() -> None:
        print_findings(findings)
        print("all checks pass" if healthy else "a check failed, see PROBLEM above")

    data = {"healthy": healthy, "findings": [finding._asdict() for finding in findings]}
    return Result(int(not healthy), data, show)


def print_findings(findings: list[Finding]) -> None:
    rows = []
    for finding in findings:
        rows.append(("ok" if finding.ok else "PROBLEM", finding.what, finding.seen))
        if not finding.ok:
            rows.append(("", "", f"remedy: {finding.remedy}"))
    print_table(("", "what", "seen"), rows)


def installation() -> Iterator[Finding]:
    """Findings that need no import of torch or a host."""
    copies = list(importlib.metadata.distributions(name=DISTRIBUTION))
    versions = ", ".join(copy.version for copy in copies)
    yield Finding(
        "distribution",
        len(copies) == 1,
        f"{len(copies)} installed ({versions})" if copies else "not installed",
        "pip uninstall glm5-patch until none is left, then install one"
        if copies
        else "pip install glm5-patch (a source tree on the path has no entry point)",
    )
    for copy in copies:
        yield from _editable_source(copy)
    points = importlib.metadata.entry_points(group="torch.backends", name="glm5_patch")
    yield Finding(
        "entry point of torch",
        len(points) == 1,
        f"{len(points)} found",
        "reinstall glm5-patch, or `import glm5_patch.auto` before the host",
    )
    autoload = os.environ.get(AUTOLOAD, "1")
    yield Finding(
        "torch's autoload",
        autoload != "0",
        f"{AUTOLOAD}={autoload}",
        f"unset {AUTOLOAD}, or `import glm5_patch.auto` before the host",
    )
    yield switches()
    yield _wrapt()
    cores = [
        folder
        for folder in dict.fromkeys(sys.path)
        if (Path(folder) / "megatron" / "core").is_dir()
    ]
    yield Finding(
        "megatron-core on the path",
        len(cores) <= 1,
        ", ".join(cores) or "none",
        "Python imports the first one; remove the other from PYTHONPATH or uninstall it",
    )


def switches() -> Finding:
    """Is every environment variable one that this package knows, and is nothing switched off?"""
    from ..patches.table import PATCHES

    read, found = Switches.read(), problems({patch.id for patch in PATCHES})
    is_set = [name for name in sorted(os.environ) if name.startswith(ENABLED)]
    return Finding(
        "switches",
        read.enabled and not read.disabled_ids and not found,
        "; ".join(found) or " ".join(f"{k}={os.environ[k]!r}" for k in is_set) or "none is set",
        f"unset {' or '.join(is_set)}, unless it is intended",
    )


def _wrapt() -> Finding:
    """Is wrapt as new as this distribution requires?"""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    (needed,) = [r for r in requirements if r.startswith("wrapt")] or ["wrapt"]
    oldest = re.search(r">=\s*([\d.]+)", needed)
    version = installed_version("wrapt")
    return Finding(
        "wrapt",
        version is not None and (oldest is None or _release(version) >= _release(oldest[1])),
        version or "not installed",
        f"pip install '{needed}'",
    )


def _release(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def _editable_source(copy: importlib.metadata.Distribution) -> Iterator[Finding]:
    origin = json.loads(copy.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        source = Path(unquote(urlparse(origin["url"]).path))
        yield Finding(
            "editable source",
            (source / "glm5_patch").is_dir(),
            str(source),
            "the source tree is gone: reinstall glm5-patch",
        )


def _in_a_second_process() -> list[dict]:
    code = (
        "import torch, json; from glm5_patch.tools.doctor import probe; "
        "print(json.dumps([finding._asdict() for finding in probe()]))"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise GLM5PatchError(
            f"importing torch and the hosts took more than {_TIMEOUT_S} s"
        ) from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise GLM5PatchError(f"a process that imports torch and the hosts fails: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def probe() -> Iterator[Finding]:
    """Is each patch in place? Call it in a process that has imported torch and nothing else."""
    from ..patches import MACHINE
    from ..patching.imports import import_host
    from ..patching.ledger import State

    active = any(row.state is not State.DISABLED for row in MACHINE.status())
    yield Finding(
        "active after `import torch`",
        active,
        f"{len(MACHINE.patches)} patches armed" if active else "no patch is armed",
        "see the entry point, the autoload and the switches above",
    )
    yield _kernels()
    if not active:
        return
    present = []
    for host in sorted({patch.host for patch in MACHINE.patches}):
        own = [patch for patch in MACHINE.patches if patch.host == host]
        try:
            found = [patch for patch in own if import_host(patch.module)]
        except Exception as error:
            cause = f"does not import: {type(error).__name__}: {error}"
            yield Finding(
                f"host {host}", False, cause, f"repair or uninstall {own[0].distribution}"
            )
            continue
        present += found
        needed = (p for p in own if not p.on_request and not p.may_be_absent)
        absent = next((p.module for p in needed if p not in found), None)
        if found and absent:
            yield Finding(
                f"host {host}",
                False,
                f"module {absent} is missing",
                "use megatron-core 0.16.0 or later",
            )
        else:
            yield Finding(f"host {host}", True, _version(own[0].distribution, bool(found)))
    yield Finding(
        "hosts",
        bool(present),
        f"{len(present)} of {len(MACHINE.patches)} patches have a host here",
        "install megatron-core",
    )
    core = sys.modules.get("megatron.core.transformer.transformer_config")
    if core is not None:
        from ..patches.probes.megatron_core import why_arguments_fail

        cause = why_arguments_fail(core.TransformerConfig)
        yield Finding(
            "command line of Megatron-LM",
            cause is None,
            cause or "every dsa_ field is an argument",
            "Megatron-LM can launch no model; report it, and set GLM5_PATCH=0 until it is fixed",
        )
    for patch in present:
        cause = MACHINE.why_not_in_place(patch)
        row = MACHINE.row(patch.id)
        yield Finding(
            patch.id,
            cause is None,
            cause or f"{row.state.value}: {row.reason}",
            f"without it: {patch.why}",
        )
        for module, name in MACHINE.missed_aliases(patch):
            yield Finding(
                f"{patch.id}, alias",
                False,
                f"{module}.{name} is still the host's own",
                "import torch (or glm5_patch.auto) before the module that holds the alias",
            )


def _kernels() -> Finding:
    """Can the backend that ``GLM5_PATCH_KERNELS`` asks for run here?"""
    import torch

    from ..ops.needs import Call
    from ..ops.registry import backends, computed_by, why_not

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    remedy = f"unset {KERNELS}, or set it to torch"
    try:
        asked, call = kernels(), Call(device, torch.bfloat16)
        reasons = [why_not(one, call) for one in backends() if one.answers_to(asked)]
        if reasons and all(reasons):
            return Finding("kernels", False, f"{KERNELS}={asked}: {reasons[0]}", remedy)
        seen = f"sparse attention in bf16: {computed_by(device, torch.bfloat16)}"
        return Finding("kernels", True, seen)
    except GLM5PatchError as error:
        return Finding("kernels", False, str(error), remedy)


def _version(distribution: str, found: bool) -> str:
    if not found:
        return "not installed"
    return f"{distribution} {installed_version(distribution) or 'from a folder on the path'}"
