"""``glm5-patch status``, ``explain`` and ``env``: the installation, and what each patch is for."""

from __future__ import annotations

import json
import os
import platform
import warnings
from pathlib import Path

from .. import __version__
from ..env import TENSOR_PARALLEL, Switches, installed_version, tensor_parallel
from ..errors import GLM5PatchError
from .report import Result, print_table, print_text, say

_DISTRIBUTIONS = (
    "torch",
    "triton",
    "transformer-engine",
    "megatron-core",
    "megatron-bridge",
    "mcore-bridge",
    "transformers",
    "wrapt",
    "nvidia-cudnn-frontend",
    "flash_mla",
    "deep_gemm",
)
_SHARED_OUT = {
    "auto": "tokens under sequence parallelism, else heads",
    "tokens": "tokens",
    "heads": "heads",
}
_VARIABLES = ("GLM5_PATCH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "CUDA_VISIBLE_DEVICES")


def of_installation() -> Result:
    """Findings that need no import of torch or a host."""
    from ..patches.table import PATCHES
    from ..patching.imports import is_there
    from .doctor import installation, print_findings

    switches, findings = Switches.read(), list(installation())
    rows = []
    for patch in PATCHES:
        enabled = switches.enabled and patch.id not in switches.disabled_ids
        state = "enabled" if enabled else "disabled"
        target = "there" if is_there(patch.module) else "not installed"
        rows.append((patch.id, state, target, patch.attribute))
    healthy = all(finding.ok for finding in findings)
    data = {
        "versions": versions(),
        "healthy": healthy,
        "tensor_parallel": _shared_out(),
        "findings": [finding._asdict() for finding in findings],
        "patches": [
            {"id": row[0], "state": row[1], "target": row[2], "seam": patch.seam}
            for row, patch in zip(rows, PATCHES)
        ],
    }

    def show() -> None:
        print_table(("package", "version"), list(data["versions"].items()))
        print_findings(findings)
        print_table(("patch", "state", "target", "attribute"), rows)
        print_text(f"tensor parallelism shares out: {data['tensor_parallel']}")
        print_text("glm5-patch status --import imports the hosts and shows the state of each patch")

    return Result(int(not healthy), data, show)


def of_hosts() -> Result:
    """The state of each patch in this process, once the installed hosts are imported.

    Raises:
        GLM5PatchError: torch is not installed.
    """
    import glm5_patch

    try:
        import torch  # every real process activates the plugin this way
    except ImportError:
        raise GLM5PatchError("torch is not installed here, so nothing loads the plugin") from None
    from ..ops.registry import table
    from ..patches.announce import sparse_attention_by
    from .doctor import switches

    active = any(row.state.value != "disabled" for row in glm5_patch.status())
    warnings.filterwarnings("ignore", category=UserWarning)  # the hosts' notes on absent packages
    kernels, problem, backends = None, None, []
    try:
        finding = switches()
        if not finding.ok:
            problem = finding.seen
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backends = table(device, torch.bfloat16)
        if active:
            glm5_patch.require()
        kernels = sparse_attention_by(torch.bfloat16)
    except GLM5PatchError as error:
        problem = str(error)
    rows = list(glm5_patch.status())
    data = {
        "version": __version__,
        "active": active,
        "problem": problem,
        "kernels": kernels,
        "tensor_parallel": _shared_out(),
        "backends": [row._asdict() for row in backends],
        "patches": [row._asdict() for row in rows],
    }

    def show() -> None:
        state = "active" if active else "NOT ACTIVE"
        print_text(f"glm5-patch {__version__}: {state} in a process that imports torch")
        print_table(("patch", "state", "reason"), [row.cells() for row in rows])
        print_text(f"sparse attention in bf16: {kernels or 'unknown, see the problem'}")
        print_text(f"tensor parallelism shares out: {data['tensor_parallel']}")
        if backends:
            print_table(
                ("operation", "backend", "here", "takes"),
                [(row.operation, row.backend, row.here, row.takes) for row in backends],
            )
        if problem:
            say(f"problem: {problem}")

    return Result(1 if problem or not active else 0, data, show)


def _shared_out() -> str:
    """What tensor parallelism shares out in sparse attention, as far as no model is known."""
    try:
        asked = tensor_parallel()
    except GLM5PatchError as error:
        return f"unknown: {error}"
    return f"{_SHARED_OUT[asked]} ({TENSOR_PARALLEL}={asked})"


def explain(patch_id: str | None) -> Result:
    """The record of one patch, or of all.

    Raises:
        GLM5PatchError: there is no such patch.
    """
    from ..patches.table import PATCHES

    chosen = [patch for patch in PATCHES if patch_id in (None, patch.id)]
    if not chosen:
        raise GLM5PatchError(
            f"no patch is called {patch_id!r}; there are {', '.join(p.id for p in PATCHES)}"
        )
    recorded = json.loads((Path(__file__).parent / "hosts.json").read_text())
    data = [
        {
            "id": patch.id,
            "seam": patch.seam,
            "without it": patch.why,
            "upstream": patch.upstream,
            "remove when": patch.remove_when,
            "hosts": _hosts(patch, recorded.get(patch.id, {})),
        }
        for patch in chosen
    ]

    def show() -> None:
        for number, (patch, row) in enumerate(zip(chosen, data)):
            print(patch.id if number == 0 else f"\n{patch.id}")
            for name, value in {**row, "seam": f"{patch.attribute} of {patch.module}"}.items():
                if name != "id":
                    print_text(f"{name}: {value}", indent="  ")

    return Result(0, data, show)


def _hosts(patch, releases: dict[str, str]) -> str:
    """ "megatron-core: patched on 0.16.0, ...; correct without it on 0.19.0", from the record."""
    by_word: dict[str, list[str]] = {}
    for release, word in releases.items():
        by_word.setdefault(word, []).append(release)
    words = {
        "patched": "patched on",
        "native": "correct without it on",
        "absent": "without this module on",
    }
    parts = (f"{words[word]} {', '.join(found)}" for word, found in by_word.items())
    return f"{patch.distribution}: {'; '.join(parts) or 'not recorded'}"


def environment() -> Result:
    """Versions of the packages and the switches that are set."""
    found = versions()
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)}

    def show() -> None:
        print_table(("package", "version"), list(found.items()))
        print("\n".join(f"{k}={v}" for k, v in variables.items()) or "no switch is set")

    return Result(0, {"versions": found, "environment": variables}, show)


def versions() -> dict[str, str]:
    found = {"glm5-patch": __version__, "python": platform.python_version()}
    found |= {name: installed_version(name) or "not installed" for name in _DISTRIBUTIONS}
    return {**found, "platform": platform.platform()}
