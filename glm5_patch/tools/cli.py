"""The ``glm5-patch`` command: its options, and how every command ends.

Exit codes: 0 all checks pass; 1 a check failed; 2 the input or the installation is unusable;
130 interrupted; 141 the reader of its output has gone. With ``--json`` stdout carries one JSON
value in the first three cases; for 2 it is ``{"error": message}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import NoReturn

from .. import __version__
from ..errors import GLM5PatchError
from .report import Result, notes_said, say

OWN_MODELS = ("gpt", "hybrid")
UNUSABLE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    """Run a command and print its result or its error; the exit code."""
    as_json = "--json" in argv
    try:
        options = _parser().parse_args(argv)
        options.arguments = argv
        # A host that prints must not mix with what is printed here.
        with redirect_stdout(sys.stderr):
            result: Result = options.run(options)
        if as_json:
            print(json.dumps(result.data, indent=2))
        else:
            result.show()
        return result.code
    except BrokenPipeError:
        raise
    except (_UsageError, GLM5PatchError) as error:
        message = str(error)
    except ImportError as error:
        what = error.name or "a package"
        message = f"{argv[0]} needs {what} ({error}); pip install 'glm5-patch[demo]'"
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        message = f"{named}{error.strerror or error}"
    except Exception as error:
        traceback.print_exc()
        message = (
            f"{type(error).__name__}: {error}; report it with the traceback and the output of "
            "glm5-patch env"
        )
    if as_json:
        print(json.dumps({"error": message}))
    else:
        say(f"glm5-patch: {message}")
    return UNUSABLE


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="glm5-patch", description="GLM-5 on the megatron-core you already have.")
    parser.add_argument("--version", action="version", version=f"glm5-patch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    status = commands.add_parser(
        "status", help="show what is installed, switched on and patched (imports no host)"
    )
    status.add_argument(
        "--import",
        action="store_true",
        dest="imports",
        help="import the installed hosts and show the state of each patch",
    )
    status.set_defaults(run=_status)

    doctor = commands.add_parser(
        "doctor", help="find problems of this installation, each with its remedy"
    )
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="show what a patch is for")
    explain.add_argument("id", nargs="?", metavar="ID", help="a patch (default: all)")
    explain.set_defaults(run=_explain)

    env = commands.add_parser("env", help="print versions and switches, to paste into a report")
    env.set_defaults(run=_env)

    verify = commands.add_parser(
        "verify", help="compare a small model with Hugging Face on this installation"
    )
    _add_model_options(verify)
    verify.add_argument(
        "--model",
        type=_model,
        default="gpt",
        help="gpt or hybrid: this package's GPTModel or HybridModel; or MODULE:FUNCTION or "
        "PATH.py:FUNCTION: any GLM-5, by a function that gets the directory of a small checkpoint "
        "and returns a model from ids to logits",
    )
    verify.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FAULT",
        help="a known fault that is not to count, such as latent_norm_eps; may be repeated",
    )
    verify.add_argument(
        "--card", metavar="FILE", help="write what was found, and where, to this YAML file"
    )
    verify.set_defaults(run=_verify)

    demo = commands.add_parser(
        "demo", help="verify, then train a small model, save it and read it back"
    )
    _add_model_options(demo)
    demo.add_argument("--model", choices=OWN_MODELS, default="gpt", help="GPTModel or HybridModel")
    demo.add_argument("--steps", type=_positive, default=20, help="training steps (default: 20)")
    demo.add_argument("--output", metavar="DIR", help="keep the trained checkpoint here")
    demo.set_defaults(run=_demo)

    plan = commands.add_parser(
        "plan",
        help="list the valid pipeline splits of a model, or the kinds of parallelism, best first",
    )
    plan.add_argument(
        "--config",
        required=True,
        metavar="PATH",
        help="a config.json (any file name), or the directory that holds it",
    )
    asked = plan.add_mutually_exclusive_group(required=True)
    asked.add_argument("--pp", type=_positive, help="pipeline parallel size, to split by layers")
    asked.add_argument("--gpus", type=_positive, help="GPUs, to compare TP, CP, EP and PP on")
    plan.add_argument(
        "--tokens", type=_positive, default=32768, help="of a sequence, with --gpus (32768)"
    )
    plan.add_argument(
        "--gpu-memory", type=_positive, default=80, metavar="GIB", help="with --gpus (80)"
    )
    plan.add_argument(
        "--vpp", type=_positive, default=1, help="virtual stages of each rank (default: 1)"
    )
    plan.add_argument("--mtp", action="store_true", help="include the multi-token-prediction layer")
    plan.add_argument(
        "--topk-across-stages",
        action="store_true",
        help="chunks may start on any layer, as dsa_topk_across_stages allows",
    )
    plan.add_argument(
        "--indexer-types",
        metavar="PATTERN",
        help="F and S, a letter for each layer, instead of the config.json's schedule",
    )
    plan.add_argument(
        "--seq-length",
        type=_positive,
        default=32768,
        help="tokens of a document, for the estimates (default: 32768)",
    )
    plan.add_argument("--top", type=_positive, default=5, help="how many plans (default: 5)")
    plan.set_defaults(run=_plan)

    overlap = _add_overlap(commands)
    _add_checkpoint(commands)
    for command in (status, doctor, explain, env, verify, demo, plan, overlap):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_overlap(commands) -> argparse.ArgumentParser:
    overlap = commands.add_parser(
        "overlap", help="show which layers of a checkpoint select alike, and which may share"
    )
    overlap.add_argument("--checkpoint", required=True, metavar="DIR")
    overlap.add_argument("--text", required=True, metavar="FILE", help="what the model reads")
    overlap.add_argument(
        "--keep",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the indexers, in the pattern (default: 0.25)",
    )
    overlap.add_argument(
        "--seq-length", type=_positive, help="tokens of a sequence (default: 4 x index_topk)"
    )
    overlap.add_argument(
        "--sequences", type=_positive, default=8, help="at most so many (default: 8)"
    )
    overlap.add_argument("--heat-map", metavar="PNG", help="draw one (needs matplotlib)")
    overlap.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    overlap.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    overlap.set_defaults(run=_overlap)
    return overlap


def _add_checkpoint(commands) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="check a Hugging Face checkpoint, or convert its indexers' order"
    )
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION", dest="action")
    check = actions.add_parser(
        "check", help="check names and shapes of all tensors, and the order of the indexers"
    )
    check.add_argument("directory", metavar="DIR")
    convert = actions.add_parser(
        "convert", help="write it with the rotary dimensions of its indexers moved"
    )
    convert.add_argument("directory", metavar="DIR")
    convert.add_argument("output", metavar="OUTPUT")
    orders = ("rope-first", "rope-last")
    convert.add_argument(
        "--from",
        choices=orders,
        dest="given",
        help="the present order, if you know it and have no related checkpoint",
    )
    convert.add_argument(
        "--to",
        choices=orders,
        default="rope-first",
        help="Hugging Face's order (default), or the order of megatron-core 0.16 to 0.18",
    )
    for action, run in ((check, _checkpoint_check), (convert, _checkpoint_convert)):
        action.add_argument(
            "--like",
            metavar="DIR",
            help="a related checkpoint in Hugging Face's order, to measure the present order by",
        )
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=run)

    dequantize = actions.add_parser("dequantize", help="write a block FP8 checkpoint in bf16")
    dequantize.add_argument("directory", metavar="DIR")
    dequantize.add_argument("output", metavar="OUTPUT")
    dequantize.add_argument("--json", action="store_true", help="print JSON")
    dequantize.set_defaults(run=_checkpoint_dequantize)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flavour", choices=("5.2", "5.1"), default="5.2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--impl", choices=("local", "transformer_engine"), default="local", help="module backend"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpoint", metavar="DIR", help="a small checkpoint of your own")
    parser.add_argument("--seq-length", type=_positive, help="tokens (default: from index_topk)")
    parser.add_argument("--seed", type=int, default=0)


def _model(text: str) -> str:
    if text not in OWN_MODELS and ":" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be one of {', '.join(OWN_MODELS)}, MODULE:FUNCTION or PATH.py:FUNCTION"
        )
    return text


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


# Each command's module is imported when the command runs: some import torch.


def _status(options: argparse.Namespace) -> Result:
    from . import status

    return status.of_hosts() if options.imports else status.of_installation()


def _explain(options: argparse.Namespace) -> Result:
    from .status import explain

    return explain(options.id)


def _env(options: argparse.Namespace) -> Result:
    from .status import environment

    return environment()


def _doctor(options: argparse.Namespace) -> Result:
    from .doctor import run

    return run()


def _verify(options: argparse.Namespace) -> Result:
    from pathlib import Path

    from .card import write_card

    card = Path(options.card) if options.card else None
    if card is not None and not card.parent.is_dir():
        raise _UsageError(f"--card {card}: {card.parent} is no directory")
    if card is not None and card.is_dir():
        raise _UsageError(f"--card {card}: a directory; it must be a file")
    _before_torch(options)
    if options.model not in OWN_MODELS:
        from .verify_model import run
    elif options.allow:
        raise _UsageError(f"--allow {options.allow[0]}: it goes with --model MODULE:FUNCTION")
    else:
        from .verify import run

    try:
        with notes_said():
            result = run(options)
    except GLM5PatchError as error:
        if card is not None:
            refused = Result(UNUSABLE, {"error": str(error)}, lambda: None)
            write_card(card, options.arguments, refused)
        raise
    if card is not None:
        write_card(card, options.arguments, result)
    return result


def _demo(options: argparse.Namespace) -> Result:
    _before_torch(options)
    from .demo import run

    with notes_said():
        return run(options)


def _before_torch(options: argparse.Namespace) -> None:
    say(f"glm5-patch {options.command}: importing torch, megatron-core and transformers")
    # cuBLAS reads it once. A parity check in TF32 would be no check.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def _checkpoint_check(options: argparse.Namespace) -> Result:
    from .checkpoint import check

    return check(options.directory, options.like)


def _checkpoint_convert(options: argparse.Namespace) -> Result:
    from .checkpoint import convert

    return convert(options.directory, options.output, options.to, options.like, options.given)


def _checkpoint_dequantize(options: argparse.Namespace) -> Result:
    from .checkpoint import dequantize

    return dequantize(options.directory, options.output)


def _plan(options: argparse.Namespace) -> Result:
    from .plan import run

    return run(options)


def _overlap(options: argparse.Namespace) -> Result:
    say("glm5-patch overlap: importing torch and megatron-core")
    from .overlap import run

    with notes_said():
        return run(options)
