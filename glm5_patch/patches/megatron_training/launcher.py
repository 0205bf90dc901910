"""What the patches of ``megatron.training`` have in common."""

from __future__ import annotations

from typing import ClassVar


class LauncherPatch:
    """A patch of Megatron-LM's launcher, which is in its source and in wheels from 0.17 on."""

    on_request: ClassVar[bool] = True
    distribution: ClassVar[str] = "megatron-lm"
