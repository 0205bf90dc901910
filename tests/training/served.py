"""The indexer's losses of all layers that use its top-k, one by one and with everything in memory.

The attention's inputs are watched in a forward without any loss. What is computed of them is
``tests.ops.dense`` in fp64.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from glm5_patch.attention.attention import CrossLayerDSAttention
from glm5_patch.topk.tokens import Layout
from tests.ops import dense
from tests.tiny import packed, tokens

COEFFICIENT = 0.1
LAYOUTS = {"bshd": None, "thd": [1, 25, 20], "padded": [4, 24, 20]}
REAL = {"padded": [1, 22, 20]}
"""Tokens of each document that are not padding."""


def microbatch(layout: str, seed: int):
    """ids, positions, packed_seq_params."""
    lengths = LAYOUTS[layout]
    if lengths is None:
        ids = tokens(seed, 2, 44)
        return ids, torch.arange(44).expand_as(ids), None
    pack = packed(lengths)
    if layout in REAL:
        pack.cu_seqlens_q_padded = pack.cu_seqlens_kv_padded = pack.cu_seqlens_q
        pack.cu_seqlens_q = pack.cu_seqlens_kv = packed(REAL[layout]).cu_seqlens_q
    ids = tokens(seed, 1, sum(lengths))
    return ids, torch.cat([torch.arange(n) for n in lengths])[None], pack


def real_tokens(layout: str, s: int) -> list[int]:
    """Places of the tokens that are not padding."""
    if layout not in REAL:
        return list(range(s))
    starts = [sum(LAYOUTS[layout][:n]) for n in range(len(LAYOUTS[layout]))]
    return [start + n for start, real in zip(starts, REAL[layout]) for n in range(real)]


@contextmanager
def watched(model):
    """Each forward of an attention: the module, and what it is computed of."""
    seen = []
    attend, observers = CrossLayerDSAttention.attend, []

    def watch(core, query, latent, up_projection, hidden_states, q_latent, *rest, **named):
        inputs = query, latent, up_projection, hidden_states, q_latent
        seen.append((core, [tensor.detach().clone() for tensor in inputs]))
        return attend(core, *inputs, *rest, **named)

    cores = [m for m in model.modules() if isinstance(m, CrossLayerDSAttention)]
    for core in cores:
        core.observer = lambda number, topk_indices: observers.append(topk_indices.clone())
    CrossLayerDSAttention.attend = watch
    try:
        yield seen, observers
    finally:
        CrossLayerDSAttention.attend = attend
        for core in cores:
            del core.observer


def losses_by_layer(model, layout: str, seed: int, group_of, sparse: bool = True):
    """Each forward of an attention -> the source's module and KL(its attention || the indexer of
    its source), with the graph of the indexer's parameters.

    Args:
        model: trained without a loss of the indexers.
        layout, seed: of the microbatch.
        group_of: the number of a forward -> that of the forward whose indexer selected.
        sparse: over the selected keys alone.
    """
    ids, positions, pack = microbatch(layout, seed)
    with torch.no_grad(), watched(model) as (seen, topk):
        model.train()(ids, positions, None, packed_seq_params=pack, labels=ids)
    s, real = ids.shape[1], real_tokens(layout, ids.shape[1])
    lengths = LAYOUTS[layout] or [s]
    found = []
    for number, (core, (query, latent, up, _, _)) in enumerate(seen):
        source, (_, _, _, hidden_states, q_latent) = seen[group_of(number)]
        where = Layout.of(core.config, core.cp_group, pack, s, ids.device)
        inputs = source.indexer.inputs(hidden_states, q_latent, where)
        scores = dense.index_scores(*(t.double() for t in inputs), source.indexer.softmax_scale)
        mask = dense.visible(lengths).expand(scores.shape)
        if sparse:
            mask = dense.selected(topk[number], lengths)
        dims = core.dims
        latent, up, query = latent.double(), up.double(), query.double()
        key, _ = dense.keys_and_values(latent, up, dims.nope, dims.value)
        probs = dense.probabilities(query, key, mask, core.softmax_scale)
        loss = dense.index_loss(scores[:, real], probs[:, :, real], mask[:, real])
        found.append((source, COEFFICIENT * loss))
    return found


def expected(model, found) -> tuple[dict, dict]:
    """The mean of the losses of each source, and its gradients, by the indexer's module."""
    by_source: dict = {}
    for source, loss in found:
        by_source.setdefault(source, []).append(loss)
    names = {parameter: name for name, parameter in model.named_parameters()}
    losses, gradients = {}, {}
    for source, terms in by_source.items():
        parameters = list(source.indexer.parameters())
        each = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
        for place, parameter in enumerate(parameters):
            mean = sum(grads[place].double() for grads in each) / len(each)
            gradients[names[parameter]] = mean
        depth = source.topk_source.mtp_depth
        slot = source.config.num_layers + depth if depth else source.layer_number
        losses[slot] = sum(term.item() for term in terms) / len(terms)
    return losses, gradients
