"""Load somebody's GLM-5 and get its logits, whatever it is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import GLM5PatchError
from ..parity import LowerTies
from .spec import describes_layers, model_of

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
FLOATS = (torch.float32, torch.float64)


class Candidate:
    """An implementation, by the function that builds it.

    Args:
        function: a checkpoint's directory -> the model, or a context manager that yields it; or a
            class of transformers; or a spec function of Megatron (``spec.model_of``).
        name: of the function, in messages.
        device: of the model, "cpu" or "cuda".
    """

    def __init__(self, function: Callable, name: str, device: str = "cpu"):
        self.name, self.device = name, device
        self._function = function

    @classmethod
    def named(cls, target: str, device: str = "cpu") -> Candidate:
        """Import "MODULE:FUNCTION" or "PATH.py:FUNCTION".

        Raises:
            GLM5PatchError: there is no such module or function, or it is not callable.
        """
        place, _, path = target.rpartition(":")
        if not place or not path:
            raise GLM5PatchError(
                f"{target!r} must be MODULE:FUNCTION or PATH.py:FUNCTION; FUNCTION gets the "
                "directory of a checkpoint and returns the model"
            )
        found: Any = _module(target, place)
        for part in path.split("."):
            if not hasattr(found, part):
                public = [name for name in dir(found) if not name.startswith("_")]
                raise GLM5PatchError(
                    f"{target}: {place} has no {part!r}; it has {', '.join(public) or 'nothing'}"
                )
            found = getattr(found, part)
        if not callable(found):
            raise GLM5PatchError(
                f"{target}: {path} is of type {type(found).__name__}, which can't be called; it "
                "must be a function of a checkpoint's directory"
            )
        return cls(found, target, device)

    @contextmanager
    def built(self, directory: Path) -> Iterator[Any]:
        """The model with the weights of this directory.

        A function that uses megatron-core may leave the initialisation of its parallelism to this
        one: where the function raises without any, it is called again in a world of one process.

        Raises:
            GLM5PatchError: the function raises.
        """
        with ExitStack() as stack:
            alone = True
            try:
                model = self._make(directory, stack)
            except (Exception, SystemExit) as error:
                if not _lacks_world():
                    raise _raised(f"{self.name} raised", error) from error
                alone = False
            if not alone:
                from ..cpu_host import single_process

                stack.enter_context(single_process(self.device))
                try:
                    model = self._make(directory, stack)
                except (Exception, SystemExit) as error:
                    raise _raised(f"{self.name} raised", error) from error
            yield model

    def _make(self, directory: Path, stack: ExitStack):
        """A context manager yields the model, and takes it down at the end."""
        made = self._call(directory)
        return stack.enter_context(made) if hasattr(made, "__enter__") else made

    def _call(self, directory: Path):
        if hasattr(self._function, "from_pretrained"):
            options = dict(dtype=torch.float32, attn_implementation="eager")
            return self._function.from_pretrained(directory, **options).to(self.device)
        if describes_layers(self._function):
            return model_of(self._function, directory)
        return self._function(directory)


def _module(target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # a console script does not have it
        try:
            return importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise _raised(f"{target}: {place} can't be imported", error) from error
    path = Path(place).resolve()
    if not path.is_file():
        raise GLM5PatchError(f"{target}: {place}: no such file")
    sys.path.append(str(path.parent))  # last: a file beside it may have a package's name
    spec = importlib.util.spec_from_file_location(f"_glm5_verified_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _raised(f"{target}: {place} can't be imported", error) from error
    return module


def _raised(what: str, error: BaseException) -> GLM5PatchError:
    """With the place in the implementation, and the last one, which is often inside torch."""
    frames = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent != Path(__file__).parent
        and "importlib" not in frame.filename
    ]
    where = ", from ".join(dict.fromkeys([*frames[:1], *frames[-1:]]))
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return GLM5PatchError(f"{what}: {said}{f' ({where})' if where else ''}")


def _lacks_world() -> bool:
    """Whether megatron-core is loaded and its parallelism is not initialised."""
    if "megatron.core" not in sys.modules or torch.distributed.is_initialized():
        return False
    from megatron.core import parallel_state

    return not parallel_state.model_parallel_is_initialized()


def logits_of(model, ids: Tensor, vocab_size: int, name: str = "the model") -> Tensor:
    """fp32 logits [b, s, vocab] on the CPU.

    Args:
        model: an ``nn.Module`` or a callable. It is called with ids alone, or with ids, position
            ids and no mask if its signature asks for these, as Megatron's ``GPTModel``.
        ids: int64 [b, s]. An ``nn.Module`` gets them on its own device.
        vocab_size: of the checkpoint. A padded vocabulary is cut.
        name: of the model, in messages.

    Raises:
        GLM5PatchError: the model can't be called, raises, or returns something else than logits.
    """
    if not callable(model):
        raise GLM5PatchError(
            f"{name} returned {type(model).__name__}, which can't be called; it must be an "
            "nn.Module, or a function of ids [b, s] that returns logits [b, s, vocab]"
        )
    if isinstance(model, torch.nn.Module):
        _check_dtype(model, name)
        model.eval()
        ids = ids.to(next((value.device for value in model.parameters()), ids.device))
    arguments = _arguments(model, ids, name)
    try:
        with torch.no_grad(), LowerTies():
            output = model(ids.clone(), **arguments)
    except (Exception, SystemExit) as error:
        shape = list(ids.shape)
        raise _raised(f"{name}: the model raised for ids {shape}", error) from error
    return _logits(output, ids, vocab_size, name)


def _check_dtype(model: torch.nn.Module, name: str) -> None:
    for parameter, value in model.named_parameters():
        if value.is_floating_point() and value.dtype not in FLOATS:
            raise GLM5PatchError(
                f"{name}: {parameter} is {value.dtype}; the comparison is made in fp32: build the "
                "model with torch.float32"
            )


def _arguments(model, ids: Tensor, name: str) -> dict[str, Any]:
    parameters = _parameters(model)
    given: dict[str, Any] = {}
    if "position_ids" in parameters and _is_required(parameters["position_ids"]):
        given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if "attention_mask" in parameters and _is_required(parameters["attention_mask"]):
        given["attention_mask"] = None
    if "use_cache" in parameters:
        given["use_cache"] = False
    needed = [name for name, one in parameters.items() if _is_required(one)]
    missing = [one for one in needed[1:] if one not in given]
    if missing:
        raise GLM5PatchError(
            f"{name}: the model needs {', '.join(missing)} beside the ids; return a function of "
            "the ids alone, lambda ids: model(ids, ...)"
        )
    return given


def _parameters(model) -> dict[str, inspect.Parameter]:
    """Of a wrapper that hands everything on (``DistributedDataParallel``, ``Float16Module``): those
    of what it wraps."""
    try:
        called = model.forward if isinstance(model, torch.nn.Module) else model
        parameters = dict(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        return {}
    named = [one for one in parameters.values() if one.kind not in VARIABLE]
    if not named and isinstance(getattr(model, "module", None), torch.nn.Module):
        return _parameters(model.module)
    return parameters


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in VARIABLE


def _logits(output, ids: Tensor, vocab_size: int, name: str) -> Tensor:
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    wanted = f"[{ids.shape[0]}, {ids.shape[1]}, {vocab_size}] (b, s, vocab)"
    if not isinstance(output, Tensor):
        raise GLM5PatchError(
            f"{name}: the model returned {type(output).__name__}; it must return logits {wanted}"
        )
    shape = list(output.shape)
    if len(shape) != 3 or shape[:2] != list(ids.shape) or shape[2] < vocab_size:
        turned = shape[:2] == [*ids.shape][::-1] and len(shape) == 3
        hint = "; transpose the first two dimensions" if turned else ""
        raise GLM5PatchError(
            f"{name}: the model returned a tensor {shape}; it must return logits {wanted}{hint}"
        )
    if output.dtype not in FLOATS:
        raise GLM5PatchError(
            f"{name}: the logits are {output.dtype}; the comparison is made in fp32: build the "
            "model with torch.float32"
        )
    return output.detach()[..., :vocab_size].float().cpu()


@contextmanager
def recorded_layers(model, layers: int, batch: int) -> Iterator[list[Tensor]]:
    """The output of each decoder layer of the forwards inside, [b, s, h]; empty where the model is
    no ``nn.Module`` or holds its layers otherwise.

    Args:
        model: the implementation.
        layers: its number of layers.
        batch: of the ids, to tell [b, s, h] from Megatron's [s, b, h].
    """
    found: list[Tensor] = []
    stacks = [
        module
        for name, module in (model.named_modules() if isinstance(model, torch.nn.Module) else ())
        if isinstance(module, torch.nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h", "blocks")
        and len(module) in (layers, 2 * layers)  # a HybridModel has two for each
    ]

    def keep(module, args, output) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            found.append((hidden if len(hidden) == batch else hidden.transpose(0, 1)).float().cpu())

    each = len(stacks[0]) // layers if stacks else 1
    modules = list(stacks[0])[each - 1 :: each] if stacks else []
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
