"""``parse_args``: ``--glm5-config DIR`` makes a config.json the defaults of the command line."""

from __future__ import annotations

import argparse
import inspect
import sys

from ...config.arguments import CONFIG_ARGUMENT, CONFIG_FLAG, model_arguments
from ...errors import GLM5PatchError
from ...patching.patch import Finding, Patch
from .launcher import LauncherPatch


class ConfigFlag(LauncherPatch, Patch):
    id = "config_flag"
    module = "megatron.training.arguments"
    attribute = "parse_args"
    why = "A GLM-5 takes some forty flags, and several defaults are another model's."
    upstream = "none: Megatron-LM reads no config.json"
    remove_when = "Megatron-LM's command line is filled in from a config.json"

    def needed(self, module) -> Finding:
        return Finding(True, f"the parser has no {CONFIG_FLAG}")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _parse, reads=("extra_args_provider",))


def _parse(wrapped, instance, args, kwargs):
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    others = call.arguments.get("extra_args_provider")
    directory = _directory()

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = parser if others is None else others(parser)
        _add_flag(parser.add_argument_group("glm5-patch"))
        if directory is not None:
            parser.set_defaults(**_arguments_of(directory))
        return parser

    call.arguments["extra_args_provider"] = add_arguments
    parsed = wrapped(*call.args, **call.kwargs)
    if directory is not None and getattr(parsed, CONFIG_ARGUMENT, None) != directory:
        raise GLM5PatchError(
            f"{CONFIG_FLAG} {directory} has no effect, because the arguments come from elsewhere "
            "(--yaml-cfg); use one of them"
        )
    return parsed


def _add_flag(group) -> None:
    group.add_argument(
        CONFIG_FLAG,
        metavar="DIR",
        default=argparse.SUPPRESS,  # a namespace without it is what it always was
        help="A directory with the config.json of a GLM-5. Every argument that describes the "
        "model gets its value from there; one that says something else is an error.",
    )


def _directory() -> str | None:
    """What the command line gives the flag. Defaults must be known before the line is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_flag(parser)
    try:
        return getattr(parser.parse_known_args(sys.argv[1:])[0], CONFIG_ARGUMENT, None)
    except argparse.ArgumentError:
        return None  # the real parser says what is wrong


def _arguments_of(directory: str) -> dict:
    from ...config.huggingface import HFConfig

    return model_arguments(HFConfig.from_directory(directory))
