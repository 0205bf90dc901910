"""Whose attention the layers of a built model have, told by their classes."""

from __future__ import annotations

import enum
import re
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from ..config.fields import ACROSS_STAGES, LOSS_LAYERS, SOURCE, learns_across_layers
from ..errors import GLM5PatchError, PipelineSplitError, ScheduleError

if TYPE_CHECKING:
    from torch import nn

OUR_ATTENTION = "glm5_patch.attention.attention"
HOST_ATTENTION = "megatron.core.transformer.experimental_attention_variant.dsa"
INDEXER = re.compile(r"(^|\.)(indexer|wq_b|weights_proj)(\.|$)")
"""What the indexer, or its projections, are called in every implementation of GLM-5."""


class Owner(enum.Enum):
    """Who wrote the sparse attention of a layer."""

    PLUGIN = "the plugin's"
    HOST = "megatron-core's, with its index sharing repaired"
    CLIENT_ON_HOST = "on megatron-core's, with its index sharing repaired"
    CLIENT = "not the plugin's"

    @property
    def vouched(self) -> bool:
        """Whether the plugin knows what this attention computes."""
        return self is not Owner.CLIENT


class Attention(NamedTuple):
    """The sparse attention of one layer."""

    owner: Owner
    name: str
    """Module and class."""
    core: nn.Module
    """What selects keys and attends to them; of a client, the whole attention of the layer."""
    layer_number: int
    layer_attention: nn.Module
    """The whole attention of the layer, with its projections and norms."""


class Summary(NamedTuple):
    """Which sparse attention a model has, and in how many layers."""

    layers: tuple[tuple[Owner, str, int], ...]

    @classmethod
    def of(cls, attentions: list[Attention]) -> Summary:
        counts = Counter((attention.owner, attention.name) for attention in attentions)
        return cls(tuple((owner, name, n) for (owner, name), n in counts.items()))

    @property
    def foreign(self) -> bool:
        """Whether some layer has attention that the plugin knows nothing of."""
        return not all(owner.vouched for owner, _, _ in self.layers)

    @property
    def of_plugin(self) -> bool:
        """Whether every layer has the plugin's attention."""
        return all(owner is Owner.PLUGIN for owner, _, _ in self.layers)

    @property
    def kinds(self) -> frozenset:
        """The same for all chunks of a pipeline that are built of the same layers."""
        return frozenset((owner, name) for owner, name, _ in self.layers)

    def __str__(self) -> str:
        return "; ".join(_words(*layer) for layer in self.layers)


def _words(owner: Owner, name: str, count: int) -> str:
    layers = f"{count} layer{'s' if count > 1 else ''}"
    if owner in (Owner.PLUGIN, Owner.HOST):
        return f"attention of {layers}: {owner.value}"
    if owner is Owner.CLIENT_ON_HOST:
        return f"attention of {layers}: {name}, {owner.value}"
    return f"attention of {layers} is {owner.value}: {name}"


def attentions_of(model: nn.Module) -> list[Attention]:
    """The sparse attention of each layer of a model, in the order of its modules.

    Layers without an indexer count where another layer of the model has the same attention with
    one: they are its skip layers. Dense attention does not count.
    """
    layers = list(_layers(model))
    foreign = {type(attention) for _, attention in layers if _has_indexer(attention)}
    found = []
    for layer, attention in layers:
        core = getattr(attention, "core_attention", None)
        owner = _owner_of_core(core)
        if owner is None:
            if type(attention) not in foreign or _is_known(type(attention)):
                continue
            owner, core = Owner.CLIENT, attention
        found.append(Attention(owner, _name(type(core)), core, layer.layer_number, attention))
    return found


def raise_unless_right(attentions: list[Attention], config) -> None:
    """Raise GLM5PatchError for attention of megatron-core's that is not GLM-5's here, and for
    latents that nothing normalises.

    Args:
        attentions: of a model that is a GLM-5.
        config: its ``TransformerConfig``.
    """
    for attention in attentions:
        absent = absent_latent_norms(attention, config)
        if absent:
            raise GLM5PatchError(
                f"layer {attention.layer_number} of this GLM-5 has qk_layernorm=True, but "
                f"{' and '.join(absent)} of its spec is IdentityOp and no norm is fused into the "
                "up projection, so the latents are not normalised. Give the layer (dsa_layer of "
                "a HybridStack) as self_attention what "
                "get_experimental_attention_variant_module_spec(config) returns"
            )
        if attention.owner not in (Owner.HOST, Owner.CLIENT_ON_HOST):
            continue
        reason = why_host_attention_is_wrong(attention, config)
        if reason:
            raise GLM5PatchError(
                f"layer {attention.layer_number} of this GLM-5 is built with {attention.name}: "
                f"{reason}. Build it from the spec of "
                "get_transformer_block_with_experimental_attention_variant_spec(config)"
            )


def raise_unless_sources_are_here(stack: nn.Module, attentions: list[Attention], config) -> None:
    """Raise PipelineSplitError if a skip layer's source is on another pipeline stage, and
    ScheduleError if it has no attention.

    A GPTModel's split is checked for all stages before it is built; this is for stacks that are
    built otherwise, as a HybridStack.

    Args:
        stack: of layers, of a GLM-5.
        attentions: of its layers.
        config: its ``TransformerConfig``.
    """
    numbers = {layer.layer_number for layer in getattr(stack, "layers", ())}
    here = {attention.layer_number for attention in attentions}
    for attention in attentions:
        topk_source = getattr(attention.core, "topk_source", None)
        if topk_source is None or topk_source.source in here or topk_source.is_mtp:
            continue
        if topk_source.source in numbers:
            raise ScheduleError(
                f"layer {attention.layer_number} is a skip layer whose source, layer "
                f"{topk_source.source}, has no attention. A HybridModel numbers layers across "
                "kinds: give dsa_indexer_types an entry for each, 'none' (N) where there is no "
                "attention, as transformer_config(hf, hybrid=True) does"
            )
        crosses = getattr(config, ACROSS_STAGES, False)
        if crosses and not learns_across_layers(config):
            continue
        instead = (
            f"{LOSS_LAYERS}={SOURCE!r}: an indexer learns only from layers of its own stage"
            if crosses
            else f"{ACROSS_STAGES}=True: the stage before then sends the top-k"
        )
        raise PipelineSplitError(
            f"layer {attention.layer_number} is a skip layer whose source, layer "
            f"{topk_source.source}, is not in the same stack; start each pipeline stage on a "
            f"computing layer, or set {instead}"
        )


def absent_latent_norms(attention: Attention, config) -> list[str]:
    """The norms of latents that the configuration asks for and this layer does without."""
    from megatron.core.transformer.identity_op import IdentityOp

    from .megatron_core.building.latent_norm_names import FUSED_INTO

    if not getattr(config, "qk_layernorm", False) or not attention.owner.vouched:
        return []
    layer = attention.layer_attention
    return [
        norm
        for norm, linear in FUSED_INTO.items()
        if isinstance(getattr(layer, norm, None), IdentityOp)
        and not hasattr(getattr(layer, linear, None), "layer_norm_weight")
    ]


def why_host_attention_is_wrong(attention: Attention, config) -> str | None:
    """What GLM-5 needs and this module of megatron-core, or a subclass of it, does not do."""
    from .megatron_core.running.index_share_carrier import keeps_forwards_apart
    from .probes.megatron_core import shares_topk, why_indexer_is_wrong

    dsa = sys.modules[HOST_ATTENTION]
    if not shares_topk(dsa):
        return "this megatron-core's DSAttention has no index sharing"
    reason = why_indexer_is_wrong(dsa.DSAIndexer)
    if reason:
        return reason
    if config.recompute_granularity is None or not getattr(attention.core, "index_share", False):
        return None
    finding = keeps_forwards_apart(attention.core)
    if not finding.needed:
        return None
    return (
        f"{finding.reason}, so that a recompute may read the top-k of another microbatch; train "
        f"without recompute (recompute_granularity=None, now {config.recompute_granularity!r})"
    )


def require_attention(model: nn.Module) -> None:
    """Raise GLM5PatchError unless every sparse layer of a model has attention that is known.

    Known is the plugin's, and megatron-core's where the plugin finds or makes it right.
    """
    attentions = attentions_of(model)
    if not attentions:
        raise GLM5PatchError(
            f"{type(model).__name__} has no layer with sparse attention, so it is not a GLM-5; "
            'build it with experimental_attention_variant="dsa"'
        )
    summary = Summary.of(attentions)
    if summary.foreign:
        raise GLM5PatchError(
            f"{summary}. glm5-patch can't say whether it is right; build the model from the spec "
            "of get_transformer_block_with_experimental_attention_variant_spec(config)"
        )
    raise_unless_right(attentions, _config_of(model, attentions))


def _config_of(model: nn.Module, attentions: list[Attention]):
    return getattr(model, "config", None) or attentions[0].core.config


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        attention = getattr(module, "self_attention", None)
        if attention is not None and hasattr(module, "layer_number"):
            yield module, attention


def _owner_of_core(core) -> Owner | None:
    if isinstance(core, _class(OUR_ATTENTION, "CrossLayerDSAttention")):
        return Owner.PLUGIN
    if isinstance(core, _class(HOST_ATTENTION, "DSAttention")):
        return Owner.HOST if _is_known(type(core)) else Owner.CLIENT_ON_HOST
    return None


def _has_indexer(attention: nn.Module) -> bool:
    return any(INDEXER.search(name) for name, _ in attention.named_modules())


def _is_known(cls: type) -> bool:
    return cls.__module__.startswith(("megatron.core.", "glm5_patch."))


def _class(module: str, name: str) -> type | tuple[()]:
    """A class, for ``isinstance``; where its module is not imported, nothing is one."""
    found: ModuleType | None = sys.modules.get(module)
    return getattr(found, name, ()) if found is not None else ()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
