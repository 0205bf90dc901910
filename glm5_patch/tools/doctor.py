"""Whether the plugin really works in this installation, and what to do where it does not.

What can be read without importing torch is read here; the rest is done in a process of its own,
which imports torch and each host module as a program would, and reports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from ..env import DISABLE, ENABLED, Switches, installed_version
from ..errors import GLM5PatchError
from .report import print_table

DISTRIBUTION = "glm5-patch"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OLDEST_WRAPT = (2, 4)
_TIMEOUT_S = 300


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    ok: bool
    seen: str
    remedy: str = ""


def run(options: argparse.Namespace) -> int:
    """0 if all is well, 1 if something is not.

    Raises:
        GLM5PatchError: nothing can be said: torch does not import here.
    """
    findings = list(installation())
    probed = _in_a_process_of_its_own()
    findings += [Finding(**finding) for finding in probed]
    healthy = all(finding.ok for finding in findings)
    if options.json:
        print(json.dumps({"healthy": healthy, "findings": [f._asdict() for f in findings]}))
        return int(not healthy)
    print_findings(findings)
    print("all is well" if healthy else "something is wrong, see above")
    return int(not healthy)


def print_findings(findings: list[Finding]) -> None:
    print_table(
        ("", "what", "seen", "remedy"),
        [("ok" if f.ok else "PROBLEM", f.what, f.seen, "" if f.ok else f.remedy) for f in findings],
    )


def installation() -> Iterator[Finding]:
    """What can be seen without importing torch or a host."""
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
    switches = Switches.read()
    yield Finding(
        "switches",
        switches.enabled and not switches.disabled_ids,
        f"{ENABLED}={os.environ.get(ENABLED, '')!r} {DISABLE}={os.environ.get(DISABLE, '')!r}",
        f"unset {ENABLED} and {DISABLE}, unless you mean it",
    )
    version = importlib.metadata.version("wrapt")
    yield Finding(
        "wrapt",
        tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_WRAPT,
        version,
        f"pip install 'wrapt>={'.'.join(map(str, OLDEST_WRAPT))},<3'",
    )
    cores = [
        folder
        for folder in dict.fromkeys(sys.path)
        if (Path(folder) / "megatron" / "core").is_dir()
    ]
    yield Finding(
        "megatron-core on the path",
        len(cores) <= 1,
        ", ".join(cores) or "none",
        "the first one is imported; take the other off PYTHONPATH or uninstall it",
    )


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


def _in_a_process_of_its_own() -> list[dict]:
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
        raise GLM5PatchError(f"importing torch and the hosts took over {_TIMEOUT_S} s") from None
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise GLM5PatchError(f"a process that imports torch and the hosts dies: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def probe() -> Iterator[Finding]:
    """In a process that has imported torch and nothing else: is each patch where it should be?"""
    from ..patches import PATCHES
    from ..patching import imports as hooks
    from ..patching.ledger import LEDGER, State

    active = any(entry.state is not State.DISABLED for entry in LEDGER)
    yield Finding(
        "active after `import torch`",
        active,
        f"{len(list(LEDGER))} patches armed" if active else "no patch is armed",
        "see the entry point, the autoload and the switches above",
    )
    if not active:
        return
    present = []
    for host in sorted({patch.host for patch in PATCHES}):
        own = [patch for patch in PATCHES if patch.host == host]
        try:
            found = [patch for patch in own if hooks.import_host(patch.module)]
        except Exception as error:
            cause = f"does not import: {type(error).__name__}: {error}"
            yield Finding(f"host {host}", False, cause, f"mend or uninstall {own[0].distribution}")
            continue
        present += found
        if found and len(found) < len(own):
            absent = next(patch.module for patch in own if patch not in found)
            yield Finding(f"host {host}", False, f"lacks {absent}", "use megatron-core 0.16.0 on")
        else:
            yield Finding(f"host {host}", True, _version(own[0].distribution, bool(found)))
    yield Finding(
        "hosts", bool(present), f"{len(present)} patches have one", "install megatron-core"
    )
    core = sys.modules.get("megatron.core.transformer.transformer_config")
    if core is not None:
        from ..patches.probes.megatron_core import why_arguments_fail

        cause = why_arguments_fail(core.TransformerConfig)
        yield Finding(
            "command line of Megatron-LM",
            cause is None,
            cause or "every dsa_ field is an argument",
            "no model can be launched by it; report it, and set GLM5_PATCH=0 until then",
        )
    for patch in present:
        cause = hooks.why_not_in_place(patch)
        entry = LEDGER[patch.id]
        yield Finding(
            patch.id,
            cause is None,
            cause or f"{entry.state.value}: {entry.reason}",
            f"without it: {patch.why}",
        )
        for module, name in entry.seams.missed_aliases() if entry.seams else ():
            yield Finding(
                f"{patch.id}, alias",
                False,
                f"{module}.{name} still is the host's own",
                "import torch (or glm5_patch.auto) before the module that holds the alias",
            )


def _version(distribution: str, found: bool) -> str:
    if not found:
        return "not installed"
    return f"{distribution} {installed_version(distribution) or 'from a folder on the path'}"
