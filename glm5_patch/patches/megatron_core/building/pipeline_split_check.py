"""``get_transformer_block_with_experimental_attention_variant_spec``: the pipeline split check."""

from __future__ import annotations

from ....config.fields import (
    ACROSS_STAGES,
    LOSS_LAYERS,
    SOURCE,
    is_dsa,
    is_glm5,
    learns_across_layers,
)
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import refuses_dsa
from .gate import check_gate


class BlockSpec(Patch):
    id = "pipeline_split_check"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "get_transformer_block_with_experimental_attention_variant_spec"
    why = "A pipeline stage that starts on a skip layer has no top-k to reuse."
    upstream = "megatron-core 0.19.0 checks freq and offset, but no list of types"
    remove_when = "the host checks every schedule and its message has a valid split"

    def needed(self, module) -> Finding:
        return Finding(True, "the host does not check every schedule")

    def apply(self, module, seams) -> None:
        def build(wrapped, instance, args, kwargs):
            config = argument(wrapped, args, kwargs, "config")
            if is_glm5(config):
                check_gate(config)
                if learns_across_layers(config) or not getattr(config, ACROSS_STAGES, False):
                    _check_split(module, config)
            elif is_dsa(config):
                if not hasattr(config, "dsa_is_glm5") and refuses_dsa():
                    check_gate(config)  # the fields are missing, and only a GLM-5 could be meant
                from ...announce import announce_other_dsa  # here: `import torch` need not pay

                announce_other_dsa(config)
            return wrapped(*args, **kwargs)

        seams.wrap(module, self.attribute, build, reads=("config",))
        if hasattr(module, HOSTS_OWN_CHECK):
            seams.wrap(module, HOSTS_OWN_CHECK, _unless_topk_crosses, reads=("config",))


HOSTS_OWN_CHECK = "_validate_dsa_index_share_pipeline_split"
"""Of megatron-core 0.19 on. It knows of no top-k that crosses stages."""


def _unless_topk_crosses(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    if not (is_glm5(config) and getattr(config, ACROSS_STAGES, False)):
        wrapped(*args, **kwargs)


def _check_split(module, config) -> None:
    """Look at every chunk of every rank, so that all ranks raise, with the same message."""
    from ....config.pipeline_split import check_split, chunk_label
    from ....config.schedule import IndexSchedule
    from ....errors import PipelineSplitError

    chunks, labels = [], []
    last_layer = 0
    virtual = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual) if virtual else (None,):
        for pp_rank in range(config.pipeline_model_parallel_size):
            count = _layers_in_chunk(module, config, vp_stage, pp_rank)
            chunks.append(range(last_layer + 1, last_layer + count + 1))
            last_layer += count
            labels.append(chunk_label(pp_rank, vp_stage))
    try:
        check_split(IndexSchedule.from_megatron(config), chunks, labels)
    except PipelineSplitError as error:
        if getattr(config, ACROSS_STAGES, False):
            raise PipelineSplitError(
                f"{error}. Or set {LOSS_LAYERS}={SOURCE!r} (now "
                f"{config.dsa_indexer_loss_layers!r}): an indexer learns only from layers of its "
                "own stage"
            ) from None
        raise PipelineSplitError(
            f"{error}. Or set {ACROSS_STAGES}=True (--{ACROSS_STAGES.replace('_', '-')}): any "
            "split is valid then, and the stage before sends the top-k"
        ) from None


def _layers_in_chunk(module, config, vp_stage, pp_rank) -> int:
    layout = config.pipeline_model_parallel_layout
    if layout is None:
        return module.get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    # Its own methods answer for this rank's global state; the table is the same everywhere.
    return layout.layout[pp_rank][vp_stage or 0].count(module.LayerType.decoder)
