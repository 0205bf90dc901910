"""``TransformerBlock.__init__``: no GLM-5 model is built while a needed patch is missing.

Once it is built, its layers say whose attention they have.
"""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument


class Gate(Patch):
    id = "gate"
    module = "megatron.core.transformer.transformer_block"
    attribute = "TransformerBlock.__init__"
    why = "A model is built and trained wrongly when a needed patch is missing."
    upstream = "none: it checks this package's own patches"
    remove_when = "no other patch is left"

    def needed(self, module) -> Finding:
        return Finding(True, "every GLM-5 model passes here")

    def apply(self, module, seams) -> None:
        seams.wrap(module.TransformerBlock, "__init__", gated, reads=("config",))


def gated(wrapped, instance, args, kwargs):
    """Build a stack of layers: the gate before it, and a look at what was built after it."""
    config = argument(wrapped, args, kwargs, "config")
    if is_glm5(config):
        check_gate(config)
    result = wrapped(*args, **kwargs)
    if is_glm5(config) or getattr(config, "multi_latent_attention", False):
        from ...announce import announce  # here: `import torch` need not pay for it

        announce(instance, config)
    return result


def check_gate(config) -> None:
    """Raise GLM5PatchError if a patch that this model needs is not in place.

    The spec builders call it too: whichever of the three places is still patched speaks up.
    """
    from ... import MACHINE

    MACHINE.raise_unless_in_place(config=config)
