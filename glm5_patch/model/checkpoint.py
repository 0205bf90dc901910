"""Hugging Face checkpoints of GLM-5: checked, loaded into a Megatron model, and written back.

A checkpoint of a model with index sharing has indexer tensors on its computing layers only.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .hf_config import HFConfig

MAX_SHARD_BYTES = 5 << 30
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")

_INDEXER = re.compile(r"model\.layers\.(\d+)\.self_attn\.indexer\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def expected_tensors(hf: HFConfig, mtp_layers: int = 0) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint must have for this model.

    Args:
        hf: the model.
        mtp_layers: multi-token-prediction layers that it is built with; each computes its top-k.
    """
    h, heads = hf.hidden_size, hf.num_attention_heads
    qk_head_dim = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not hf.tie_word_embeddings:
        shapes["lm_head.weight"] = (hf.vocab_size, h)
    attention = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_a_proj.weight": (hf.q_lora_rank, h),
        "self_attn.q_a_layernorm.weight": (hf.q_lora_rank,),
        "self_attn.q_b_proj.weight": (heads * qk_head_dim, hf.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (hf.kv_lora_rank + hf.qk_rope_head_dim, h),
        "self_attn.kv_a_layernorm.weight": (hf.kv_lora_rank,),
        "self_attn.kv_b_proj.weight": (
            heads * (hf.qk_nope_head_dim + hf.v_head_dim),
            hf.kv_lora_rank,
        ),
        "self_attn.o_proj.weight": (h, heads * hf.v_head_dim),
    }
    indexer = {
        "self_attn.indexer.wq_b.weight": (hf.index_n_heads * hf.index_head_dim, hf.q_lora_rank),
        "self_attn.indexer.wk.weight": (hf.index_head_dim, h),
        "self_attn.indexer.k_norm.weight": (hf.index_head_dim,),
        "self_attn.indexer.k_norm.bias": (hf.index_head_dim,),
        "self_attn.indexer.weights_proj.weight": (hf.index_n_heads, h),
    }
    moe = {
        "mlp.gate.weight": (hf.n_routed_experts, h),
        "mlp.gate.e_score_correction_bias": (hf.n_routed_experts,),
        **_mlp("mlp.shared_experts", h, hf.moe_intermediate_size * hf.n_shared_experts),
    }
    for expert in range(hf.n_routed_experts):
        moe.update(_mlp(f"mlp.experts.{expert}", h, hf.moe_intermediate_size))
    dense = _mlp("mlp", h, hf.intermediate_size)
    for index, is_moe in enumerate(hf.moe_layers):
        layer = {**attention, **(moe if is_moe else dense)}
        if hf.schedule.computes(index + 1):
            layer.update(indexer)
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    mtp = {
        "enorm.weight": (h,),
        "hnorm.weight": (h,),
        "eh_proj.weight": (h, 2 * h),
        "shared_head.norm.weight": (h,),
    }
    for index in range(hf.num_hidden_layers, hf.num_hidden_layers + mtp_layers):
        layer = {**attention, **indexer, **moe, **mtp}
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    return shapes


def _mlp(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


class Survey(NamedTuple):
    """The names of a checkpoint's tensors, beside those that a model needs."""

    read: tuple[str, ...]
    """What the model takes."""
    missing: tuple[str, ...]
    expected_absent: tuple[str, ...]
    """Indexer tensors of skip layers, as they would be called: rightly not there."""
    dropped: tuple[str, ...]
    """Indexer tensors of skip layers, as some conversions write them; not read."""
    mtp: tuple[str, ...]
    """Tensors of multi-token-prediction layers that the model is built without; not read."""
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], hf: HFConfig, expected: Collection[str]) -> Survey:
        """Of the names that a checkpoint has, and those that ``expected_tensors`` gives."""
        names, expected = set(names), set(expected)
        dropped, mtp, unexpected = [], [], []
        for name in sorted(names - expected):
            layer = _LAYER.match(name)
            if layer and int(layer[1]) >= hf.num_hidden_layers:
                mtp.append(name)
            elif _INDEXER.match(name):
                dropped.append(name)
            elif name != "lm_head.weight":  # a tied head may be written out
                unexpected.append(name)
        indexer = {_INDEXER.sub("", name) for name in expected if _INDEXER.match(name)}
        of_skip_layers = [
            f"model.layers.{number - 1}.self_attn.indexer.{name}"
            for number in range(1, hf.num_hidden_layers + 1)
            if not hf.schedule.computes(number)
            for name in sorted(indexer)
        ]
        return cls(
            read=tuple(sorted(names & expected)),
            missing=tuple(sorted(expected - names)),
            expected_absent=tuple(name for name in of_skip_layers if name not in names),
            dropped=tuple(dropped),
            mtp=tuple(mtp),
            unexpected=tuple(unexpected),
        )


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds, beside what the model needs."""

    tensors: int
    """Tensors that the model takes."""
    computing_layers: int
    skip_layers: int
    """Layers without indexer tensors, as it should be."""
    dropped: tuple[str, ...]
    """Indexer tensors on skip layers, as some conversions write them; not loaded."""
    mtp: tuple[str, ...]
    """Tensors of the multi-token-prediction layers; not loaded."""

    def __str__(self) -> str:
        text = (
            f"{self.tensors} tensors, indexers on {self.computing_layers} computing layers; "
            f"{self.skip_layers} skip layers, no indexer expected"
        )
        if self.dropped:
            text += f"; {len(self.dropped)} indexer tensors on skip layers dropped"
        if self.mtp:
            text += f"; {len(self.mtp)} tensors of the MTP layer not loaded"
        return text


class HFCheckpoint:
    """A directory with config.json and safetensors files, checked before anything is built.

    Only headers are read until ``read`` is called.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError, in one line, for a directory that can't be this model."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self.config = HFConfig.from_directory(self.directory)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files():
            with self._open(path) as file:
                for name in file.keys():
                    self._files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        self.config = self.config.agreeing_with(self.shapes, self.directory / "config.json")

    @cached_property
    def report(self) -> CheckpointReport:
        """Compare with what the configuration asks for.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is unknown.
        """
        return self._report(0)

    def _report(self, mtp_layers: int) -> CheckpointReport:
        expected = expected_tensors(self.config, mtp_layers)
        survey = Survey.of(self.shapes, self.config, expected)
        schedule = self.config.schedule
        for name, shape in expected.items():
            if name not in self.shapes:
                hint = missing_hint(name, self.config)
                raise CheckpointError(f"{self.directory}: {name} is missing{hint}")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self._files[name]}: {name} has shape {list(self.shapes[name])}, "
                    f"config.json makes it {list(shape)}"
                )
        for name in survey.unexpected:
            raise CheckpointError(f"{self._files[name]}: {name} is no tensor of this model")
        computing = len(schedule.computing_layers)
        return CheckpointReport(
            tensors=len(expected),
            computing_layers=computing,
            skip_layers=schedule.num_layers - computing,
            dropped=survey.dropped,
            mtp=survey.mtp,
        )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    def load_into(self, model: torch.nn.Module) -> CheckpointReport:
        """Copy into every parameter and buffer of this rank its part of the tensors.

        Each rank reads for itself: its pipeline stage, its experts, its slice of what tensor
        parallelism splits.

        Raises:
            CheckpointError: a parameter of the model has no tensor, or none of its shape.
        """
        report = self._report(model.config.mtp_num_layers or 0)
        with torch.no_grad():
            for name, target, sources in pieces(model):
                absent = [source for source in sources if source not in self.shapes]
                if absent:
                    raise CheckpointError(f"{self.directory}: {name} needs {absent[0]}")
                target.copy_(own_part(name, [self.read(source) for source in sources], target))
        return report

    def extra_files(self) -> Iterator[Path]:
        """Everything that is no weight and not config.json: tokenizer, generation config, ..."""
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and path.name != "config.json":
                if not path.name.endswith(_WEIGHT_SUFFIXES):
                    yield path

    def _weight_files(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: not an index of safetensors: {error!r}") from None
            files = sorted({self.directory / name for name in weight_map.values()})
        else:
            files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.directory}: no .safetensors file")
        for path in files:
            if not path.exists():
                raise CheckpointError(f"{path}: no such file, but {index.name} names it")
        return files

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from None


def missing_hint(name: str, hf: HFConfig) -> str:
    """Why a tensor should be there, if that is not plain."""
    indexer = _INDEXER.match(name)
    if not indexer:
        return ""
    if int(indexer[1]) >= hf.num_hidden_layers:
        return ": the MTP layer computes its own top-k"
    return (
        f": layer {int(indexer[1]) + 1} computes its own top-k by config.json's schedule "
        f"({hf.schedule})"
    )


def shapes_in(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a few tensors of a checkpoint, opening only their files; {} if one is not there."""
    try:
        index = directory / _INDEX
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        shapes = {}
        for name in names:
            with safe_open(directory / weight_map.get(name, _SINGLE), framework="pt") as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return {}


def free_directory(output: str | Path) -> Path:
    """Where something may be written; raises CheckpointError if something is there."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty directory")
    return output


def save(
    model: torch.nn.Module,
    config: HFConfig,
    output: str | Path,
    source: HFCheckpoint | None = None,
) -> None:
    """Write a whole, unsplit model as a Hugging Face directory; it appears complete or not at all.

    Args:
        model: the Megatron model.
        config: written as config.json, with the dtype of the weights.
        output: a directory that does not exist, or is empty.
        source: the checkpoint that the model came from; its other files, and the MTP tensors that
            the model does not hold, are carried over.

    Raises:
        CheckpointError: ``output`` has files in it, or the model is split between ranks.
    """
    output = free_directory(output)
    expected = expected_tensors(config, model.config.mtp_num_layers or 0)
    tensors = dict(_unpacked(model, expected))
    absent = expected.keys() - tensors.keys()
    if absent:
        raise CheckpointError(
            f"{output}: this rank does not hold {sorted(absent)[0]} (and {len(absent) - 1} more); "
            "only a whole model can be written here"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        if source is not None:
            carried = [name for name in source.report.mtp if name not in tensors]
            tensors.update({name: source.read(name) for name in carried})
            for path in source.extra_files():
                shutil.copy2(path, partial / path.name)
        dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
        raw = {**config.raw, "dtype": dtype}
        raw.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        write_shards(tensors, partial)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / _SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


# Megatron name inside a layer -> Hugging Face names, concatenated along dimension 0.
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    **{
        f"self_attention.{megatron}": (f"self_attn.{hf}",)
        for megatron, hf in {
            "linear_q_down_proj.weight": "q_a_proj.weight",
            "q_layernorm.weight": "q_a_layernorm.weight",
            "linear_q_up_proj.layer_norm_weight": "q_a_layernorm.weight",
            "linear_q_up_proj.weight": "q_b_proj.weight",
            "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
            "kv_layernorm.weight": "kv_a_layernorm.weight",
            "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm.weight",
            "linear_kv_up_proj.weight": "kv_b_proj.weight",
            "linear_proj.weight": "o_proj.weight",
            "core_attention.indexer.linear_wq_b.weight": "indexer.wq_b.weight",
            "core_attention.indexer.linear_wk.weight": "indexer.wk.weight",
            "core_attention.indexer.k_norm.weight": "indexer.k_norm.weight",
            "core_attention.indexer.k_norm.bias": "indexer.k_norm.bias",
            "core_attention.indexer.linear_weights_proj.weight": "indexer.weights_proj.weight",
        }.items()
    },
}

_TOP_NAMES = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

MTP_NAMES = {
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "eh_proj.weight": ("eh_proj.weight",),
    "final_layernorm.weight": ("shared_head.norm.weight",),
}
MTP_LAYERS = ("transformer_layer", "mtp_model_layer")
"""The decoder layer inside an MTP layer, on megatron-core 0.16 and on later ones."""

_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MTP_LAYER = re.compile(rf"mtp\.layers\.(\d+)\.(?:(?:{'|'.join(MTP_LAYERS)})\.)?(.+)")
_FC = {"1": ("gate_proj.weight", "up_proj.weight"), "2": ("down_proj.weight",)}
_MLP = re.compile(r"(mlp|mlp\.shared_experts)\.linear_fc([12])\.weight$")
# SequentialMLP, then Transformer Engine's grouped MLP.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))$"
)


def _first_expert(config) -> int:
    """The number of this rank's first expert; expert parallelism deals them out in order."""
    ranks = config.expert_model_parallel_size
    if ranks == 1:
        return 0
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    return rank * config.num_moe_experts // ranks


def _layer_sources(name: str, first_expert: int) -> tuple[str, ...] | None:
    if name in LAYER_NAMES:
        return LAYER_NAMES[name]
    if match := _MLP.match(name):
        return tuple(f"{match[1]}.{part}" for part in _FC[match[2]])
    if match := _EXPERT.match(name):
        expert, fc = (match[1], match[2]) if match[1] else (match[4], match[3])
        return tuple(f"mlp.experts.{first_expert + int(expert)}.{part}" for part in _FC[fc])
    return None


def own_part(name: str, whole: Sequence[Tensor], like: Tensor) -> Tensor:
    """What this tensor-parallel rank holds of a parameter.

    Args:
        name: of the parameter.
        whole: what makes it, concatenated along dimension 0; each is split by itself.
        like: of this rank's shape.

    Raises:
        CheckpointError: the shapes are not those of a split between the ranks.
    """
    from megatron.core import parallel_state

    wanted = [like.shape[0] // len(whole), *like.shape[1:]]
    split = [dim for dim, size in enumerate(wanted) if size != whole[0].shape[dim]]
    if not split:
        return torch.cat(list(whole))
    if ".experts." in name:
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    if len(split) > 1 or wanted[split[0]] * ranks != whole[0].shape[split[0]]:
        raise CheckpointError(
            f"{name} has shape {list(like.shape)} on this rank, of {ranks} that share it, and the "
            f"checkpoint {len(whole)} times {list(whole[0].shape)}"
        )
    return torch.cat([tensor.chunk(ranks, split[0])[rank] for tensor in whole])


def pieces(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Each tensor of this rank's model with its name and the Hugging Face tensors that make it.

    Raises:
        CheckpointError: a parameter that no GLM-5 checkpoint has.
    """
    layers = model.decoder.layers
    first_expert = _first_expert(model.config)
    tensors = dict(model.named_parameters())
    tensors.update({n: t for n, t in model.named_buffers() if n.endswith("expert_bias")})
    for name, tensor in tensors.items():
        sources = _TOP_NAMES.get(name)
        if match := _MEGATRON_LAYER.match(name):
            # layer_number counts from 1 over all pipeline stages.
            prefix = f"model.layers.{layers[int(match[1])].layer_number - 1}."
            in_layer = _layer_sources(match[2], first_expert)
            sources = in_layer and tuple(prefix + source for source in in_layer)
        elif match := _MTP_LAYER.match(name):
            prefix = f"model.layers.{model.config.num_layers + int(match[1])}."
            in_layer = MTP_NAMES.get(match[2]) or _layer_sources(match[2], first_expert)
            sources = in_layer and tuple(prefix + source for source in in_layer)
        if sources is None:
            raise CheckpointError(f"{name}: no tensor of a GLM-5 checkpoint corresponds to it")
        yield name, tensor, sources


def _unpacked(model, expected) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of everything that this rank holds."""
    for name, tensor, sources in pieces(model):
        parts = tensor.detach().cpu().split([expected[source][0] for source in sources])
        for source, part in zip(sources, parts):
            if tuple(part.shape) != expected[source]:
                raise CheckpointError(
                    f"{name} holds {list(part.shape)} of {source} {list(expected[source])}; "
                    "only unsplit parameters can be written here"
                )
            yield source, part.contiguous()
