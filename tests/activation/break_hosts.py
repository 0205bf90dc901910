"""Break one patch or one seam of the real hosts at a time, each in a forked copy of a process.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m tests.activation.break_hosts PATCH:FAULT...

Prints one JSON line for each patch and fault, and one for the hosts as they are. A patch whose seam
can't have the fault has no line.
"""

import inspect
import json
import sys
import warnings
from importlib import import_module

import glm5_patch
from glm5_patch.errors import GLM5PatchError
from tests.activation import other_model
from tests.activation.fork import in_a_fork
from tests.activation.fresh import PATCHES


def probe_raises(patch):
    def needed(self, module):
        raise RuntimeError("broken on purpose")

    type(patch).needed = needed


def apply_raises(patch):
    """After everything was changed, so that all of it has to be undone."""
    apply = type(patch).apply

    def broken(self, module, seams):
        apply(self, module, seams)
        raise RuntimeError("broken on purpose")

    type(patch).apply = broken


def seam_renamed(patch):
    owner, name, value = _seam(patch)
    delattr(owner, name)
    if inspect.isclass(owner):
        # The class works as before, but by a method of another name.
        setattr(owner, f"{name}_renamed", value)
        if owner.__base__ is object:  # whose place nothing can take
            return
        base = type(owner.__base__)("Renamed", (owner.__base__,), {name: value})
        owner.__bases__ = tuple(base if b is owner.__base__ else b for b in owner.__bases__)


def signature_changed(patch):
    """The host still works, but nobody may call these parameters by their old names."""
    owner, name, value = _seam(patch)
    function = getattr(value, "__func__", value)

    def changed(*args, **kwargs):
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    renamed = [p.replace(name=f"new_{p.name}") for p in signature.parameters.values()]
    changed.__wrapped__ = function  # probes read its code
    changed.__signature__ = signature.replace(parameters=renamed)
    setattr(owner, name, staticmethod(changed) if isinstance(value, staticmethod) else changed)


BLOCK_SPEC = "get_transformer_block_with_experimental_attention_variant_spec"


def possible_faults(patch):
    """A flag or a class has no signature, and Python itself insists on the name ``__init__``."""
    _, name, value = _seam(patch)
    of_seams = [seam_renamed, signature_changed] if inspect.isroutine(value) else []
    if name.startswith("__"):
        of_seams = of_seams[1:]
    return [probe_raises, apply_raises, *of_seams]


def _seam(patch):
    owner = sys.modules[patch.module]
    *parts, name = patch.attribute.split(".")
    for part in parts:
        owner = getattr(owner, part, None)  # a module that older hosts do not have
    return owner, name, vars(owner).get(name) if owner else None


def outcome(patch, fault):
    """Break it, enable the plugin, and try to build a model of another kind and a GLM-5."""
    if fault is not None:
        fault(patch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        glm5_patch.enable()
    row = patch and glm5_patch.status()[patch.id]
    return {
        "patch": patch and patch.id,
        "fault": fault and fault.__name__,
        "state": row and row.state.value,
        "reason": row and row.reason,
        "states": {r.id: r.state.value for r in glm5_patch.status()},
        "warnings": [str(w.message) for w in caught if "glm5-patch:" in str(w.message)],
        "require": refused(),
        **builds(),
    }


def refused():
    """What ``require`` says; nothing if everything needed is in place."""
    try:
        glm5_patch.require()
    except GLM5PatchError as error:
        return str(error)


def builds():
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.transformer.transformer_block import TransformerBlock

    from glm5_patch.testing.cpu_host import single_process

    small = dict(num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True)
    with single_process("cpu"):
        result = {"other_model": other_model.output_shape(CONFIG), "gate": None}
        try:
            config = MLA_CONFIG(
                **small,
                experimental_attention_variant="dsa",
                transformer_impl="local",
                rope_type="rope",
                add_bias_linear=False,
                num_moe_experts=2,
                moe_router_enable_expert_bias=True,
                moe_router_score_function="sigmoid",
                mtp_num_layers=1,
                recompute_granularity="selective",
                recompute_modules=["layernorm"],
                dsa_indexer_n_heads=2,
                dsa_indexer_head_dim=64,
                dsa_indexer_topk=4,
                qk_layernorm=True,
                dsa_indexer_loss_coeff=0.1,
                **_index_sharing(),
            )
            build_spec = getattr(specs, BLOCK_SPEC, lambda config: None)
            TransformerBlock(config, build_spec(config))
        except GLM5PatchError as error:
            result["gate"] = str(error)
        except Exception as error:
            result["gate"] = f"not refused: {error!r}"
    return result


def _index_sharing():
    """By a field of ours or of the host's; a host without either builds no other DSA model."""
    takes = MLA_CONFIG.__dataclass_fields__
    for name, value in (("dsa_indexer_types", "FS"), ("dsa_indexer_topk_freq", 2)):
        if name in takes:
            return {name: value}
    return {}


def main(asked):
    print(json.dumps(in_a_fork(outcome, None, None)))
    for patch in PATCHES:
        for fault in possible_faults(patch):
            if f"{patch.id}:{fault.__name__}" in asked:
                print(json.dumps(in_a_fork(outcome, patch, fault)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for each in PATCHES:
        import_module(each.module)
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig as MLA_CONFIG,
    )
    from megatron.core.transformer.transformer_config import (
        TransformerConfig as CONFIG,
    )

    main(sys.argv[1:])
