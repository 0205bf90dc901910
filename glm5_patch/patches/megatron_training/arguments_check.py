"""``validate_args``: a command line that is nearly a GLM-5 is refused."""

from __future__ import annotations

from ...config.arguments import CONFIG_ARGUMENT, check_arguments
from ...patching.patch import Finding, Patch, argument
from ..megatron_core.building.transformer_config import is_meant_as_glm5
from .launcher import LauncherPatch


class ArgumentsCheck(LauncherPatch, Patch):
    id = "arguments_check"
    module = "megatron.training.arguments"
    attribute = "validate_args"
    why = "A GLM-5 with a flag missing trains as another model: another router, rope or bias."
    upstream = "none"
    remove_when = "Megatron-LM compares its arguments with a config.json"

    def needed(self, module) -> Finding:
        return Finding(True, "the host knows no GLM-5")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _validate, reads=("args",))


def _validate(wrapped, instance, args, kwargs):
    namespace = argument(wrapped, args, kwargs, "args")
    directory = getattr(namespace, CONFIG_ARGUMENT, None)
    if directory is not None:
        from ...config.huggingface import HFConfig

        hf = HFConfig.from_directory(directory)
        check_arguments(namespace, hf, f"{directory}/config.json")
    elif is_meant_as_glm5(namespace):
        check_arguments(namespace, None)
    return wrapped(*args, **kwargs)
