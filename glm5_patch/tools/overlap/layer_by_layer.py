"""A model whose layers have memory only while they run: a checkpoint of any size on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

from ...attention.build import gpt_model, transformer_config

if TYPE_CHECKING:
    from torch import Tensor

    from ...checkpoint.reader import HFCheckpoint

META = torch.device("meta")


class WithoutMemory(TorchFunctionMode):
    """What a module makes its parameters and buffers of has no memory, whatever device it names.
    Tables of the rope are made of ranges, and have some."""

    MAKERS = torch.empty, torch.zeros, torch.ones

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.MAKERS:
            kwargs["device"] = META
        if func is torch.Tensor.cuda and args[0].device == META:
            return args[0]  # nothing to move
        return func(*args, **kwargs)


class LayerByLayer:
    """A GPTModel without its output layer. Each layer reads its weights when its forward begins,
    and lets go of them when it ends."""

    def __init__(self, checkpoint: HFCheckpoint, device: str, settings: dict) -> None:
        """Builds it without memory.

        Args:
            checkpoint: where the weights are.
            device: where it runs.
            settings: of ``transformer_config``.
        """
        self.checkpoint, self.device = checkpoint, torch.device(device)
        config = transformer_config(checkpoint.config, **settings)
        with WithoutMemory():
            self.model = gpt_model(checkpoint.config, config, post_process=False).eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device == META and name != "expert_bias":
                    module._buffers[name] = torch.zeros_like(buffer, device=self.device)

    @contextmanager
    def loaded(self, advance: Callable[[str], None]) -> Iterator[torch.nn.Module]:
        """The model, to call once or more.

        Args:
            advance: called after each layer, with its number.
        """
        hooks = []
        for number, layer in enumerate(self.model.decoder.layers):
            prefix = f"decoder.layers.{number}."
            hooks += [
                layer.register_forward_pre_hook(lambda *_, prefix=prefix: self._load(prefix)),
                layer.register_forward_hook(
                    lambda *_, prefix=prefix, number=number: (
                        self._let_go(prefix) or advance(f"layer {number + 1}")
                    )
                ),
            ]
        self._load("embedding.")
        try:
            yield self.model
        finally:
            self._let_go("")
            for hook in hooks:
                hook.remove()

    def _load(self, prefix: str) -> None:
        self._place(prefix, lambda tensor: torch.empty_like(tensor, device=self.device))
        self.checkpoint.load_into(self.model, only=lambda name: name.startswith(prefix))

    def _let_go(self, prefix: str) -> None:
        self._place(prefix, lambda tensor: torch.empty_like(tensor, device=META))

    def _place(self, prefix: str, made: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors in the place of those that a checkpoint fills."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not name.startswith(prefix):
                continue
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            if own in module._parameters:
                placed = torch.nn.Parameter(made(tensor), requires_grad=False)
                module._parameters[own] = placed
            elif own == "expert_bias":
                module._buffers[own] = made(tensor)
