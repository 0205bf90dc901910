"""Compare a Megatron GLM-5 with Hugging Face's, layer by layer.

The oracle is ``GlmMoeDsaForCausalLM`` of transformers 5.13 or later; earlier ones compute another
indexer. Sequences must be longer than ``index_topk``, or every selection is trivially equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checkpoint.names import pieces
from ..checkpoint.reader import chunks_of
from ..config.schedule import IndexSchedule
from ..ops.query_positions import common_keys
from ..topk.carrier import open_carrier

NEAR_TIE = 2e-5
"""Two scores this close, relative to the largest of their row, are equal in fp32 after a few
layers: which of them is selected says nothing about an implementation."""


@dataclass
class Recording:
    """The top-k of each layer in one forward, and the scores it comes from."""

    topk_indices: dict[int, Tensor] = field(default_factory=dict)
    """Layer number -> int32 [b, s, k]; -1 is an empty place. The layers of a ``HybridModel`` have
    the numbers of their decoder layers."""
    _scores: dict[int, Callable[[int], Tensor]] = field(default_factory=dict)

    def row_scores(self, layer_number: int, row: int) -> Tensor:
        """Index scores of one query against the keys up to it, fp32 [b, row + 1]."""
        return self._scores[layer_number](row)


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[Recording]:
    """Record the forwards of a Megatron model inside the ``with`` block, on any host."""
    from ..attention.attention import CrossLayerDSAttention

    cores = [m for name, m in model.named_modules() if name.endswith("core_attention")]
    recording = Recording()
    with ExitStack() as undo:
        for core in cores:
            if isinstance(core, CrossLayerDSAttention):
                _record_ours(core, recording, undo)
        if any(not isinstance(core, CrossLayerDSAttention) for core in cores):
            _record_hosts(cores, recording, undo)
        yield recording


def decoder_layer(layer) -> int:
    """The number of the decoder layer that a layer, or its attention, belongs to."""
    schedule = IndexSchedule.from_megatron(layer.config)
    number = layer.layer_number
    return schedule.attention_number(number) if number <= schedule.num_layers else number


def _record_ours(core, recording: Recording, undo: ExitStack) -> None:
    number = decoder_layer(core)
    core.observer = lambda _, topk: recording.topk_indices.__setitem__(number, topk)
    undo.callback(delattr, core, "observer")
    if core.indexer is None:
        return
    from ..ops.index_topk.reference import block_scores

    select, scale = core.indexer.select, core.indexer.softmax_scale

    def recording_select(inputs, queries):
        recording._scores[number] = lambda row: block_scores(
            inputs, slice(row, row + 1), row + 1, scale
        )[:, 0]
        return select(inputs, queries)

    core.indexer.select = recording_select
    undo.callback(delattr, core.indexer, "select")


def _record_hosts(cores, recording: Recording, undo: ExitStack) -> None:
    """The host's own ``DSAttention`` (megatron-core 0.19): every layer, computing or not, hands its
    top-k to one function of its module."""
    from megatron.core.transformer.experimental_attention_variant import dsa

    running: list[int] = []
    run_sparse_attention = dsa._run_sparse_attention

    def recording_run(*args, topk_indices, **kwargs):
        queries = torch.arange(topk_indices.shape[1], device=topk_indices.device)
        visible = topk_indices.int()
        recording.topk_indices[running[-1]] = visible.masked_fill(
            visible > queries[None, :, None], -1
        )
        return run_sparse_attention(*args, topk_indices=topk_indices, **kwargs)

    dsa._run_sparse_attention = recording_run
    undo.callback(setattr, dsa, "_run_sparse_attention", run_sparse_attention)
    for core in cores:
        enter = core.register_forward_pre_hook(lambda m, *_: running.append(decoder_layer(m)))
        leave = core.register_forward_hook(lambda *_: running.pop() and None)
        undo.callback(enter.remove)
        undo.callback(leave.remove)
        if core.indexer is not None:
            _record_host_scores(core, recording, undo)


def _record_host_scores(core, recording: Recording, undo: ExitStack) -> None:
    before_topk = core.indexer.forward_before_topk

    def recording_before_topk(*args, **kwargs):
        q, k, weights = before_topk(*args, **kwargs)

        def row_scores(row: int) -> Tensor:
            per_head = torch.einsum("bhd,tbd->bht", q[row].float(), k[: row + 1].float()).relu()
            return torch.einsum("bh,bht->bt", weights[row].float(), per_head)

        recording._scores[decoder_layer(core)] = row_scores
        return q, k, weights

    core.indexer.forward_before_topk = recording_before_topk
    undo.callback(delattr, core.indexer, "forward_before_topk")


class LowerTies(TorchFunctionMode):
    """Inside, ``torch.topk`` selects the lower position among equal values, as this package does.

    By itself its choice depends on the length of the row and on the device: Hugging Face's model
    then selects other keys of a prefix than of the whole sequence.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.topk, Tensor.topk):
            return _lower_topk(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _lower_topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    found = input.sort(dim=dim, descending=largest, stable=True)
    return torch.return_types.topk(part.narrow(dim, 0, k) for part in found)


@contextmanager
def recorded_hf(model: torch.nn.Module) -> Iterator[dict[int, Tensor]]:
    """Layer number -> top-k of a ``GlmMoeDsaForCausalLM``; invisible keys, which it leaves in,
    become -1. Ties fall as in this package, see ``LowerTies``."""
    found: dict[int, Tensor] = {}

    def record(number: int):
        def hook(module, args, output):
            topk_indices = output[2]
            queries = torch.arange(topk_indices.shape[1], device=topk_indices.device)
            found[number] = topk_indices.masked_fill(topk_indices > queries[None, :, None], -1)

        return hook

    handles = [
        layer.self_attn.register_forward_hook(record(number))
        for number, layer in enumerate(model.model.layers, 1)
    ]
    try:
        with LowerTies():
            yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def same_input_shares(
    model: torch.nn.Module, reference: torch.nn.Module, ids: Tensor, recorder=recorded
) -> dict[int, float]:
    """Layer number -> ``kept_share`` when each layer's attention is fed Hugging Face's own input.

    Errors of earlier layers don't add up here: what differs is this layer's selection, and below
    fp32 its rounding.

    Args:
        model: a Megatron GPTModel or HybridModel, whole, in evaluation mode.
        reference: a ``GlmMoeDsaForCausalLM`` with the same weights.
        ids: tokens [b, s].
        recorder: how to record the model's selections.
    """
    inputs: dict[int, Tensor] = {}

    def keep(number: int):
        def hook(module, args, kwargs):
            inputs[number] = kwargs["hidden_states"]

        return hook

    with ExitStack() as undo:
        for number, layer in enumerate(reference.model.layers, 1):
            hook = layer.self_attn.register_forward_pre_hook(keep(number), with_kwargs=True)
            undo.callback(hook.remove)
        theirs = undo.enter_context(recorded_hf(reference))
        reference(ids, use_cache=False)
    with recorder(model) as ours, open_carrier(), LowerTies():
        for layer in model.decoder.layers:
            if not hasattr(layer.self_attention, "core_attention"):
                continue  # an MLP of a HybridModel
            hidden_states = inputs[decoder_layer(layer)].transpose(0, 1)  # [s, b, h]
            layer.self_attention(hidden_states, None)
    return {number: kept_share(ours.topk_indices[number], theirs[number]) for number in theirs}


_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def gradient_errors(model: torch.nn.Module, reference: torch.nn.Module) -> dict[str, float]:
    """Parameter -> distance of its gradient from Hugging Face's, relative to its norm.

    Where Hugging Face has a zero, as for an expert without tokens, the distance itself. An indexer
    has no gradient, and is not among them.

    Args:
        model: a Megatron GPTModel or HybridModel, in one chunk.
        reference: a ``GlmMoeDsaForCausalLM`` with the same weights. Of both, the backward of the
            same loss has run.
    """
    references = dict(reference.named_parameters())
    errors = {}
    (chunk,) = chunks_of(model)
    for name, parameter, sources in pieces(chunk):
        if ".indexer." in name or name.endswith("expert_bias"):
            continue
        expected = torch.cat([_hf_gradient(references, source) for source in sources])
        found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        errors[name] = ((found - expected).norm() / (expected.norm() or 1)).item()
    return errors


def _hf_gradient(references: dict[str, Tensor], source: str) -> Tensor:
    """transformers holds all experts of a layer in two parameters."""
    match = _EXPERT.fullmatch(source)
    if match is None:
        return references[source].grad
    experts, number, kind = match.groups()
    stacked = "down_proj" if kind == "down" else "gate_up_proj"
    gradient = references[f"{experts}.{stacked}"].grad[int(number)]
    return gradient if kind == "down" else gradient.chunk(2)[("gate", "up").index(kind)]


@dataclass(frozen=True)
class TopkComparison:
    """The differences between the selections of two models."""

    rows: int
    """Queries compared, over all layers."""
    differing: int
    """Queries that select other keys, without near ties."""
    near_ties: int
    """Queries whose selections differ by keys of the same score (``NEAR_TIE``)."""
    intact: Tensor
    """bool [b, s]: tokens that no near tie has touched. A token selected otherwise changes all
    later tokens of its sequence in all later layers, and those are not compared."""


def compare_topk(ours: Recording, theirs: dict[int, Tensor]) -> TopkComparison:
    """Compare every query of every layer. A layer missing on one side counts as different."""
    rows = differing = near_ties = 0
    shape = next(iter(theirs.values())).shape[:2]
    intact = torch.ones(shape, dtype=torch.bool)
    for number in sorted(theirs.keys() | ours.topk_indices.keys()):
        rows += int(intact.sum())
        if number not in theirs or number not in ours.topk_indices:
            differing += int(intact.sum())
            continue
        other = _other_selection(ours.topk_indices[number], theirs[number]).cpu() & intact
        for b, row in other.nonzero().tolist():
            if _is_near_tie(ours, theirs, number, b, row):
                near_ties += 1
                intact[b, row:] = False
            else:
                differing += 1
    return TopkComparison(rows, differing, near_ties, intact)


def _other_selection(ours: Tensor, theirs: Tensor) -> Tensor:
    """bool [b, s]: queries that select another set of keys; order does not matter."""
    return (ours.sort(-1)[0] != theirs.to(ours).sort(-1)[0]).any(-1)


def _is_near_tie(ours: Recording, theirs, number: int, b: int, row: int) -> bool:
    if number not in ours._scores:
        return False  # a skip layer differs only if its source did
    mine = set(ours.topk_indices[number][b, row].tolist())
    others = set(theirs[number][b, row].tolist())
    swapped = sorted((mine ^ others) - {-1})
    if not swapped or len(mine) != len(others):
        return False
    scores = ours.row_scores(number, row)[b]
    span = scores[swapped].max() - scores[swapped].min()
    return bool(span <= NEAR_TIE * scores.abs().max())


def kept_share(ours: Tensor, theirs: Tensor) -> float:
    """The share of their selected keys that ours has too, over all queries; 1.0 is equality.

    Both int32 [b, s, k].
    """
    shared, of = common_keys(ours, theirs.to(ours.device))
    return (shared / of.clamp_min(1)).item()


def topk_overlap(now: dict[int, Tensor], before: dict[int, Tensor]) -> dict[int, float]:
    """Layer number -> the share of its earlier keys that it selects again, for logs.

    Args:
        now: ``Recording.topk_indices`` of a forward.
        before: the same of an earlier forward, or of a reference model, on the same tokens.

    Raises:
        ValueError: the two have different layers or different tokens.
    """
    if now.keys() != before.keys():
        raise ValueError(f"layers {sorted(now)} and {sorted(before)} are not the same")
    for number, topk_indices in now.items():
        if topk_indices.shape[:2] != before[number].shape[:2]:
            shapes = tuple(topk_indices.shape[:2]), tuple(before[number].shape[:2])
            raise ValueError(
                f"layer {number}: a batch of {shapes[0]} tokens and one of {shapes[1]}"
            )
    return {number: kept_share(now[number], before[number]) for number in now}
