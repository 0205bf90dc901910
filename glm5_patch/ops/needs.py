"""What a backend takes, as data: device, data type, widths, shared memory, compute capability."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Capability = tuple[int, int]


class Verdict(NamedTuple):
    """Whether something can compute, and why not."""

    ok: bool
    reason: str = ""


class Call(NamedTuple):
    """What decides which backend computes a call."""

    device: torch.device
    dtype: torch.dtype
    widths: tuple[tuple[str, int], ...] = ()
    """Sizes that the model gives every batch, by the name of their setting."""
    sizes: tuple[tuple[str, int], ...] = ()
    """Sizes of this batch."""

    @classmethod
    def of(cls, like: Tensor, **widths: int) -> Call:
        return cls(like.device, like.dtype, tuple(widths.items()))

    def sized(self, **sizes: int) -> Call:
        """The same with sizes of the batch."""
        return self._replace(sizes=tuple(sizes.items()))

    @property
    def shape_class(self) -> tuple:
        """Equal for calls that run the same code."""
        return self.device.type, self.dtype, self.widths


class Width(NamedTuple):
    """The values that one size may have."""

    at_least: int = 1
    at_most: int | None = None
    multiple_of: int = 1
    power_of_two: bool = False
    one_of: tuple[int, ...] = ()

    def fits(self, value: int) -> bool:
        if self.one_of:
            return value in self.one_of
        return (
            value >= self.at_least
            and (self.at_most is None or value <= self.at_most)
            and value % self.multiple_of == 0
            and not (self.power_of_two and value & (value - 1))
        )

    def __str__(self) -> str:
        if self.one_of:
            return " or ".join(map(str, self.one_of))
        parts = []
        if self.power_of_two:
            parts.append("a power of two")
        if self.multiple_of > 1:
            parts.append(f"a multiple of {self.multiple_of}")
        if self.at_least > 1:
            parts.append(f"{'of ' if parts else ''}at least {self.at_least}")
        if self.at_most is not None:
            parts.append(f"at most {self.at_most}")
        return " ".join(parts) or "any"


@dataclass(frozen=True)
class Needs:
    """What a backend takes; by default everything."""

    package: str | None = None
    """The module that must be installed."""
    distribution: str | None = None
    """The name to install it by."""
    device: str | None = None
    """A type of device; None: any."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Empty: any."""
    capability: Capability | None = None
    """The oldest compute capability."""
    capability_below: Capability | None = None
    """The first compute capability that it was not tried on."""
    interpretable: bool = False
    """Whether Triton's interpreter can run it, on any device and in any data type."""
    shared_memory: int = 0
    """Bytes of shared memory that a program takes."""
    widths: Mapping[str, Width] = field(default_factory=dict)
    """Of the sizes in ``Call.widths``; a size that the call does not name is not checked."""
    sizes: Mapping[str, Width] = field(default_factory=dict)
    """Of the sizes in ``Call.sizes``, likewise."""

    def check(self, call: Call, interpreted: bool = False) -> Verdict:
        """Whether a call is of that kind.

        Args:
            call: the call.
            interpreted: Triton's interpreter runs it, if it can.
        """
        if self.package is not None and not _is_installed(self.package):
            return Verdict(False, f"{self.distribution or self.package} is not installed")
        if not (interpreted and self.interpretable):
            verdict = self._check_device(call.device)
            if not verdict.ok:
                return verdict
            if self.dtypes and call.dtype not in self.dtypes:
                takes = " and ".join(_name(dtype) for dtype in self.dtypes)
                return Verdict(False, f"it takes {takes}, not {_name(call.dtype)}")
        for rules, sizes in ((self.widths, call.widths), (self.sizes, call.sizes)):
            for name, value in sizes:
                if name in rules and not rules[name].fits(value):
                    return Verdict(False, f"{name}={value} must be {rules[name]}")
        return Verdict(True)

    def _check_device(self, device: torch.device) -> Verdict:
        if self.device not in (None, device.type):
            return Verdict(False, f"the tensors are on {device.type}")
        if device.type != "cuda" or self.capability is None:
            return Verdict(True)
        capability = torch.cuda.get_device_capability(device)
        below = self.capability_below
        if capability < self.capability or below is not None and capability >= below:
            own = ".".join(map(str, capability))
            return Verdict(False, f"compute capability {own} must be {self._capabilities}")
        if self.shared_memory:
            properties = torch.cuda.get_device_properties(device)
            there = getattr(properties, "shared_memory_per_block_optin", None)
            if there is not None and there < self.shared_memory:
                return Verdict(
                    False,
                    f"a program takes {self.shared_memory} bytes of shared memory, the device has "
                    f"{there}",
                )
        return Verdict(True)

    @property
    def _capabilities(self) -> str:
        text = "at least " + ".".join(map(str, self.capability))
        if self.capability_below is not None:
            text += " and below " + ".".join(map(str, self.capability_below))
        return text

    def __str__(self) -> str:
        parts = [self.device or ""]
        if self.capability is not None:
            parts.append(f"compute capability {self._capabilities}")
        if self.dtypes:
            parts.append(" or ".join(_name(dtype) for dtype in self.dtypes))
        if self.shared_memory:
            parts.append(f"{self.shared_memory >> 10} KiB of shared memory")
        parts += [f"{name} {rule}" for name, rule in {**self.widths, **self.sizes}.items()]
        return ", ".join(filter(None, parts)) or "everything"


def of_triton(widths: Mapping[str, Width] | None = None) -> Needs:
    """What the package's own Triton kernels take: bf16 and fp16, from Ampere on.

    Args:
        widths: rules of ``Call.widths``.
    """
    return Needs(
        package="triton",
        device="cuda",
        interpretable=True,
        dtypes=(torch.bfloat16, torch.float16),
        capability=(8, 0),
        widths=widths or {},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
