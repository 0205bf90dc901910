"""Megatron-Bridge imports here without Transformer Engine, and nothing of a stand-in ever runs.

Bridge and modelopt import names of ``transformer_engine``, and of megatron-core's extension for it,
as soon as they are imported, whatever the model uses. On a machine without a GPU there is no such
package. ``install`` gives both modules classes by those names: they can be subclassed and asked
for by ``isinstance``, and raise when they are made. The models of these tests are built with
``transformer_impl="local"``, of torch's and megatron-core's own layers. Where Transformer Engine is
installed it is used, and this does nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from unittest.mock import MagicMock

EXTENSION = "megatron.core.extensions.transformer_engine"


def install() -> None:
    """Before the first import of Bridge in this process."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    # megatron-core first: it is to find no Transformer Engine.
    import megatron.core.models.gpt.experimental_attention_variant_module_specs  # noqa: F401
    import megatron.core.models.gpt.gpt_model  # noqa: F401

    import glm5_patch.attention.local_backend  # noqa: F401

    extension = importlib.import_module(EXTENSION)
    sys.modules[EXTENSION] = None  # modelopt has a way without it
    if importlib.util.find_spec("modelopt") is not None:
        import modelopt.torch.distill  # noqa: F401

    sys.modules[EXTENSION] = extension
    for name, value in list(vars(extension).items()):
        if isinstance(value, MagicMock) or (value is None and name.startswith("TE")):
            setattr(extension, name, _class(EXTENSION, name))
    sys.meta_path.append(_Finder())


def _class(module: str, name: str) -> type:
    import torch

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"{module}.{name} is a stand-in and can't be made")

    return type(name, (torch.nn.Module,), {"__init__": refuse, "__module__": module})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of ``transformer_engine``, with whatever class is asked of it."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "transformer_engine":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = "2.11.0"

        def attribute(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            if name.islower():
                return importlib.import_module(f"{spec.name}.{name}")
            setattr(module, name, _class(spec.name, name))
            return getattr(module, name)

        module.__getattr__ = attribute
        return module

    def exec_module(self, module) -> None: ...
