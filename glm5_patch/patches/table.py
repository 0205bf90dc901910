"""The table of contents: every patch, in the order in which one host module's are applied."""

from .mcore_bridge.glm5_layers import GLM5Layers
from .megatron_bridge.conversion import Conversion
from .megatron_bridge.glm5_mappings import GLM5Mappings
from .megatron_bridge.glm5_provider import GLM5Provider
from .megatron_bridge.leftover_tensors import LeftoverTensors
from .megatron_bridge.local_lora import LocalLoRA
from .megatron_core.building.dsa_spec import DSASpec
from .megatron_core.building.gate import Gate
from .megatron_core.building.gpt_layer_specs import DecoderLayerSpecs, MTPBlockSpec
from .megatron_core.building.latent_norm_names import LatentNormNames
from .megatron_core.building.local_backend import LocalAbsorbedLinear, LocalBackend, LocalLinear
from .megatron_core.building.moe_without_te import MoEWithoutTE
from .megatron_core.building.pipeline_split_check import BlockSpec
from .megatron_core.building.position_table import PositionTable
from .megatron_core.building.router_bias import RouterBias
from .megatron_core.building.transformer_config import ConfigFields
from .megatron_core.running.attention_inputs import AttentionInputs
from .megatron_core.running.checkpoint_recompute import CheckpointRecompute
from .megatron_core.running.checkpoint_without_te import CheckpointWithoutTE
from .megatron_core.running.dsa_kernels import DSAKernels
from .megatron_core.running.index_schedule import IndexShareSchedule
from .megatron_core.running.index_share_carrier import IndexShareCarrier
from .megatron_core.running.indexer_training import (
    IndexerLossFigures,
    IndexerLossScale,
    TrainingPhase,
)
from .megatron_core.running.router_padding import RouterPadding
from .megatron_core.running.stack_carriers import (
    BlockCarrier,
    HybridCarrier,
    MambaCarrier,
    MTPCarrier,
)
from .megatron_core.running.stage_sends import PipelineSends, StageShapes
from .megatron_core.running.te_checkpoint import TECheckpoint
from .megatron_training.arguments_check import ArgumentsCheck
from .megatron_training.checkpoint_arguments import CheckpointArguments
from .megatron_training.config_flag import ConfigFlag
from .transformers.glm_moe_dsa_config import GlmMoeDsaConfigValues
from .transformers.glm_moe_dsa_weights import GlmMoeDsaConfigWeights

PATCHES = (
    ConfigFields(),
    LocalBackend(),
    LocalLinear(),
    LocalAbsorbedLinear(),
    DSASpec(),
    BlockSpec(),
    DecoderLayerSpecs(),
    MTPBlockSpec(),
    MoEWithoutTE(),
    RouterBias(),
    LatentNormNames(),
    BlockCarrier(),
    Gate(),
    PositionTable(),
    HybridCarrier(),
    MambaCarrier(),
    MTPCarrier(),
    IndexShareCarrier(),
    IndexShareSchedule(),
    AttentionInputs(),
    DSAKernels(),
    CheckpointRecompute(),
    CheckpointWithoutTE(),
    IndexerLossScale(),
    IndexerLossFigures(),
    TrainingPhase(),
    PipelineSends(),
    StageShapes(),
    RouterPadding(),
    TECheckpoint(),
    ConfigFlag(),
    ArgumentsCheck(),
    CheckpointArguments(),
    GlmMoeDsaConfigValues(),
    GlmMoeDsaConfigWeights(),
    GLM5Provider(),
    GLM5Mappings(),
    Conversion(),
    LeftoverTensors(),
    LocalLoRA(),
    GLM5Layers(),
)
