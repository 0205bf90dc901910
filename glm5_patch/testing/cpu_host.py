"""megatron-core without a GPU: for the demo, for tests, and for a small model on a laptop.

megatron-core 0.16 to 0.19 ask ``torch.cuda`` for the device of rope tables and masks, and for the
random state of checkpoints. This module makes those calls answer for the CPU. It is not used where
CUDA is available, and ``enable()`` refuses to run there.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from ..errors import GLM5PatchError

_adapted = ExitStack()


def enable(device: str = "cpu") -> None:
    """Make megatron-core run on ``device``: "cpu", or "meta" to build a model without memory.

    Raises:
        GLM5PatchError: a CUDA device is available, and megatron-core would use it.
    """
    if torch.cuda.is_available():
        raise GLM5PatchError(
            f"{device!r}: megatron-core uses the CUDA device of this machine; use 'cuda', or hide "
            "it with CUDA_VISIBLE_DEVICES="
        )
    disable()
    import megatron.core.tensor_parallel.random as random

    for owner, name, value in (
        (torch.cuda, "current_device", lambda: torch.device(device)),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "current_stream", lambda device=None: Stream()),
        (torch.cuda, "manual_seed", lambda seed: None),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
    ):
        _adapted.enter_context(mock.patch.object(owner, name, value))
    _give_inference_layers()


def _give_inference_layers() -> None:
    """megatron-core 0.20 asks of each MTP layer whether it is one of Transformer Engine's layers
    for inference, which without Transformer Engine are no classes."""
    try:
        from megatron.core.tensor_parallel import inference_layers
    except ImportError:
        return
    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        if not isinstance(getattr(inference_layers, name, object), type):
            absent = type(name, (torch.nn.Module,), {})
            _adapted.enter_context(mock.patch.object(inference_layers, name, absent))


class Stream:
    """Does nothing: the CPU runs everything in order."""

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...


def disable() -> None:
    """Restore torch and megatron-core."""
    _adapted.close()


class CudaLiterals(TorchFunctionMode):
    """Makes ``device="cuda"`` and ``.cuda()`` mean the CPU while it is entered.

    megatron-core's schedules, optimizers and distributed checkpoints write the device out, and its
    distributed optimizer asks for tensors by the type names of CUDA; context parallelism pins
    memory. A mode sees every call of torch, so it is for these alone and not part of ``enable``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if not kwargs:
            found = func(*args)
            of_type = func is torch.Tensor.type and len(args) == 1
            return found.replace("torch.", "torch.cuda.") if of_type else found
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


@contextmanager
def single_process(device: str, seed: int = 0):
    """A world of one rank, initialised as in ``megatron.training`` and torn down at the end.

    Args:
        device: "cuda", or "cpu" to run megatron-core without a GPU.
        seed: of torch and of megatron-core's random states.

    Raises:
        GLM5PatchError: ``device`` is not the one that megatron-core will use here.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    adapted = device != "cuda"
    if not adapted and not torch.cuda.is_available():
        raise GLM5PatchError("single_process('cuda'): torch sees no CUDA device; use 'cpu'")
    if adapted:
        enable(device)
    torch.manual_seed(seed)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        "gloo" if adapted else "nccl", store=store, rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(seed + 1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        if adapted:
            disable()
