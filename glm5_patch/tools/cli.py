"""The ``glm5-patch`` command.

Exit codes: 0 all is well, 1 a check failed, 2 the input or the installation is unusable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import GLM5PatchError
from .report import print_table

_DISTRIBUTIONS = (
    "torch",
    "triton",
    "transformer-engine",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "wrapt",
    "nvidia-cudnn-frontend",
    "flash_mla",
)
_SWITCHES = ("GLM5_PATCH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "CUDA_VISIBLE_DEVICES")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except GLM5PatchError as error:
        print(f"glm5-patch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glm5-patch", description="GLM-5 on the megatron-core you already have."
    )
    parser.add_argument("--version", action="version", version=f"glm5-patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    status = commands.add_parser(
        "status", help="what is installed, switched on and there to be patched; imports no host"
    )
    status.add_argument(
        "--import",
        action="store_true",
        dest="imports",
        help="import the installed hosts and say what became of each patch",
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)

    doctor = commands.add_parser(
        "doctor", help="look for what keeps the plugin from working here, with remedies"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="what one patch, or each, is for")
    explain.add_argument("id", nargs="?", help="of a patch (all)")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(run=_explain)

    env = commands.add_parser("env", help="versions and switches, to paste into a report")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=_env)

    verify = commands.add_parser(
        "verify", help="compare a small model with Hugging Face on this very installation"
    )
    _add_model_options(verify)
    verify.set_defaults(run=_demo, steps=0, output=None)

    demo = commands.add_parser(
        "demo", help="build, load, compare with Hugging Face, train, save: on a small model"
    )
    _add_model_options(demo)
    demo.add_argument("--steps", type=_positive, default=20, help="training steps (20)")
    demo.add_argument("--output", metavar="DIR", help="keep the trained checkpoint here")
    demo.set_defaults(run=_demo)

    checkpoint = commands.add_parser(
        "checkpoint", help="look at a Hugging Face checkpoint, or move its indexers' dimensions"
    )
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="are all tensors there, in their shapes and order?")
    check.add_argument("directory", metavar="DIR")
    check.add_argument(
        "--like", metavar="DIR", help="a relative in Hugging Face's order, to tell this one's by"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_checkpoint, action=_checkpoint_check)
    convert = actions.add_parser(
        "convert", help="write it with the rotary dimensions of its indexers moved"
    )
    convert.add_argument("directory", metavar="DIR")
    convert.add_argument("output", metavar="OUTPUT")
    convert.add_argument(
        "--to",
        choices=("rope-first", "rope-last"),
        default="rope-first",
        help="Hugging Face's order (default), or that of megatron-core 0.16 to 0.18",
    )
    convert.set_defaults(run=_checkpoint, action=_checkpoint_convert)

    plan = commands.add_parser("plan", help="valid pipeline splits of a checkpoint, best first")
    plan.add_argument(
        "--config", required=True, metavar="PATH", help="config.json or its directory"
    )
    plan.add_argument("--pp", type=_positive, required=True, help="pipeline parallel size")
    plan.add_argument("--vpp", type=_positive, default=1, help="virtual stages of each rank (1)")
    plan.add_argument("--mtp", action="store_true", help="with the multi-token-prediction layer")
    plan.add_argument(
        "--seq-length", type=_positive, default=32768, help="for the estimate (32768)"
    )
    plan.add_argument("--top", type=_positive, default=5, help="how many plans (5)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flavour", choices=("5.2", "5.1"), default="5.2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--impl", choices=("local", "transformer_engine"), default="local", help="module backend"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpoint", metavar="DIR", help="a small checkpoint of your own")
    parser.add_argument("--seq-length", type=_positive, help="tokens (by index_topk)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _status(options: argparse.Namespace) -> int:
    if options.imports:
        return _status_of_hosts(options)
    from ..env import Switches
    from ..patches.table import PATCHES
    from ..patching.imports import is_there
    from .doctor import installation, print_findings

    switches, findings = Switches.read(), list(installation())
    rows = []
    for patch in PATCHES:
        enabled = switches.enabled and patch.id not in switches.disabled_ids
        state = "enabled" if enabled else "disabled"
        target = "there" if is_there(patch.module) else "not installed"
        rows.append((patch.id, state, target, patch.seam))
    healthy = all(finding.ok for finding in findings)
    if options.json:
        names = ("id", "state", "target", "seam")
        found = {
            "versions": _versions(),
            "healthy": healthy,
            "findings": [finding._asdict() for finding in findings],
            "patches": [dict(zip(names, row)) for row in rows],
        }
        print(json.dumps(found, indent=2))
        return int(not healthy)
    print_table(("package", "version"), list(_versions().items()))
    print_findings(findings)
    print_table(("patch", "state", "target", "seam"), rows)
    print("`glm5-patch status --import` imports the hosts and says what became of each patch")
    return int(not healthy)


def _status_of_hosts(options: argparse.Namespace) -> int:
    import glm5_patch

    from ..patches.announce import libraries, sparse_attention_by

    try:
        import torch  # the way in for every real process
    except ImportError:
        raise GLM5PatchError("torch is not installed here, so nothing loads the plugin") from None
    loaded = any(row.state.value != "disabled" for row in glm5_patch.status())
    problem = None
    if loaded:
        try:
            glm5_patch.require()
        except GLM5PatchError as error:
            problem = str(error)
    kernels = sparse_attention_by(torch.bfloat16)
    if options.json:
        found = {
            "version": __version__,
            "active": loaded,
            "problem": problem,
            "kernels": kernels,
            "libraries": libraries(),
            "patches": [row._asdict() for row in glm5_patch.status()],
        }
        print(json.dumps(found, indent=2))
    else:
        print(
            f"glm5-patch {__version__}: {'active' if loaded else 'NOT ACTIVE'} in a process "
            "that imports torch"
        )
        print_table(("patch", "state", "reason"), [row.cells() for row in glm5_patch.status()])
        print(f"sparse attention in bf16: {kernels}")
        for name, reason in libraries().items():
            print(f"{name}: {reason or 'used where it fits'}")
        if problem:
            print(f"problem: {problem}", file=sys.stderr)
    return 1 if problem or not loaded else 0


def _checkpoint(options: argparse.Namespace) -> int:
    try:
        from ..checkpoint import indexer_order  # noqa: F401
    except ImportError as error:
        raise GLM5PatchError(
            f"checkpoint needs {error.name}: pip install 'glm5-patch[demo]'"
        ) from error
    return options.action(options)


def _checkpoint_check(options: argparse.Namespace) -> int:
    from ..checkpoint.indexer_order import ROPE_FIRST, order_beside
    from ..checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(options.directory)
    report = checkpoint.report
    order = order_beside(checkpoint, HFCheckpoint(options.like)) if options.like else None
    if options.json:
        found = {
            "schedule": str(checkpoint.config.schedule),
            "tensors": report.tensors,
            "computing_layers": report.computing_layers,
            "skip_layers": report.skip_layers,
            "dropped": report.dropped,
            "mtp": report.mtp,
            "indexer_order": order,
        }
        print(json.dumps(found, indent=2))
    else:
        print(f"{checkpoint.config.schedule}: {report}")
        unknown = "not looked at; --like DIR tells it by a relative"
        print(f"order of the indexers: {order or unknown}")
        if order not in (None, ROPE_FIRST):
            print(f"mend it: glm5-patch checkpoint convert {options.directory} OUTPUT")
    return int(order not in (None, ROPE_FIRST))


def _checkpoint_convert(options: argparse.Namespace) -> int:
    from ..checkpoint.indexer_order import convert
    from ..checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(options.directory)
    print(checkpoint.report)  # raises for a checkpoint that is not whole
    moved = convert(checkpoint, options.output, options.to)
    print(f"{options.output}: {moved} tensors of the indexers are {options.to} now")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import run

    return run(options)


def _hosts(patch, releases: dict[str, str]) -> str:
    """ "megatron-core: patched on 0.16.0, ...; right by itself on 0.19.0", as it was recorded."""
    by_word: dict[str, list[str]] = {}
    for release, word in releases.items():
        by_word.setdefault(word, []).append(release)
    words = {"patched": "patched on", "native": "right by itself on"}
    parts = (f"{words[word]} {', '.join(found)}" for word, found in by_word.items())
    return f"{patch.distribution}: {'; '.join(parts)}"


def _explain(options: argparse.Namespace) -> int:
    from ..patches.table import PATCHES

    chosen = [patch for patch in PATCHES if options.id in (None, patch.id)]
    if not chosen:
        raise GLM5PatchError(
            f"no patch is called {options.id!r}; there are {', '.join(p.id for p in PATCHES)}"
        )
    recorded = json.loads((Path(__file__).parent / "hosts.json").read_text())
    rows = [
        {
            "id": patch.id,
            "seam": patch.seam,
            "without it": patch.why,
            "upstream": patch.upstream,
            "goes when": patch.remove_when,
            "hosts": _hosts(patch, recorded[patch.id]),
        }
        for patch in chosen
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        blocks = (
            "\n".join([row["id"], *(f"  {k}: {v}" for k, v in row.items() if k != "id")])
            for row in rows
        )
        print("\n\n".join(blocks))
    return 0


def _versions() -> dict[str, str]:
    import platform

    from ..env import installed_version

    found = {"glm5-patch": __version__, "python": platform.python_version()}
    found |= {name: installed_version(name) or "not installed" for name in _DISTRIBUTIONS}
    return {**found, "platform": platform.platform()}


def _env(options: argparse.Namespace) -> int:
    found = _versions()
    switches = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)}
    if options.json:
        print(json.dumps({"versions": found, "environment": switches}, indent=2))
    else:
        print_table(("package", "version"), list(found.items()))
        print(
            "\n".join(f"{name}={value}" for name, value in switches.items()) or "no switch is set"
        )
    return 0


def _demo(options: argparse.Namespace) -> int:
    # Before torch: cuBLAS reads it once. A parity check in TF32 would be no check.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    try:
        from .demo import run
    except ImportError as error:
        raise GLM5PatchError(
            f"{options.command} needs {error.name}: pip install 'glm5-patch[demo]'"
        ) from error
    return run(options)


def _plan(options: argparse.Namespace) -> int:
    from .plan import run

    return run(options)
