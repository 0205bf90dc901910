"""``get_transformer_block_with_experimental_attention_variant_spec``: the pipeline split check."""

from __future__ import annotations

from ...core.host import is_dsa
from ...core.patch import Finding, Patch
from .gate import check_gate


class BlockSpec(Patch):
    id = "pipeline_split_check"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "get_transformer_block_with_experimental_attention_variant_spec"
    why = "A pipeline stage that starts on a skip layer has no top-k to reuse."
    upstream = "megatron-core 0.19.0 checks freq and offset, not a list of types"
    remove_when = "the host checks every schedule, and its message names a valid split"

    def needed(self, module) -> Finding:
        return Finding(True, "the host does not check every schedule")

    def apply(self, module, seams) -> None:
        def build(wrapped, instance, args, kwargs):
            config = kwargs["config"] if "config" in kwargs else args[0]
            if is_dsa(config):
                check_gate(config)
                _check_split(module, config)
            return wrapped(*args, **kwargs)

        seams.wrap(module, self.attribute, build)


def _check_split(module, config) -> None:
    """Look at every chunk of every rank, so that all ranks raise, with the same message."""
    from ...model.pipeline import check_split
    from ...model.schedule import IndexSchedule

    virtual = config.virtual_pipeline_model_parallel_size
    chunks, labels = [], []
    for vp_stage in range(virtual or 1):
        for pp_rank in range(config.pipeline_model_parallel_size):
            chunks.append(_layers(module, config, vp_stage if virtual else None, pp_rank))
            suffix = f", virtual stage {vp_stage}" if virtual else ""
            labels.append(f"pipeline stage {pp_rank}{suffix}")
    check_split(IndexSchedule.from_megatron(config), chunks, labels)


def _layers(module, config, vp_stage, pp_rank) -> list[int]:
    """Layer numbers (from 1) of one chunk, by the host's own arithmetic."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        ids = layout.get_layer_id_list(
            layer_type=module.LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        return [layer_id + 1 for layer_id in ids]
    offset = module.get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = module.get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(offset + 1, offset + count + 1))
