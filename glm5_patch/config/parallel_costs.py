"""What splitting a GLM-5 over GPUs costs: the work and the exchanges of a step, at measured rates.

The rates are of H100s over NVLink (bf16, full recompute, this package's own kernels); what crosses
hosts is reckoned at 400 Gb/s a GPU, which was not measured. Estimates, to compare splits by:
docs/parallel.md sets them beside what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PipelineSplitError
from .costs import estimate, topk_bytes_per_token
from .huggingface import HFConfig
from .pipeline_split import best_splits

FLOPS = 4.4e14
"""FLOP/s of a layer's step."""
PASSES = 4
"""A step's work in forward passes: forward, its recompute, and a backward of two."""
EXCHANGES = 3
"""A step's exchanges in those of a forward: its recompute and its backward repeat them."""
NVLINK, NETWORK = 2.8e11, 4.5e10
"""Bytes/s that a GPU sends in a collective, inside a host and between hosts."""
LATENCY = 2e-5
"""Seconds of a collective, however small."""
SMALL_PARTS = 6.5e-3
"""Seconds that a layer's step takes longer where a sequence is split: smaller matrix products,
waits of the ranks for each other."""
GPUS_OF_A_HOST = 8
FEW_TOKENS = 8192
"""Tokens of a GPU and microbatch below which its host may launch more slowly than it computes. The
rates leave that out: it depends on the host, and on the modules."""


@dataclass(frozen=True)
class ParallelSplit:
    """Sizes of one way of splitting; tensor parallelism has sequence parallelism and shares tokens
    out."""

    tp: int
    cp: int
    ep: int
    pp: int
    dp: int


@dataclass(frozen=True)
class ParallelCost:
    """What a GPU does and holds under one split."""

    split: ParallelSplit
    rate: float
    """Tokens a second and GPU, as a share of what the work alone would allow."""
    gib: float
    """Weights, gradients, the distributed optimizer's states and activations."""
    tokens: int
    """Of a GPU and microbatch."""


def parallel_costs(hf: HFConfig, tokens: int, gpus: int) -> list[ParallelCost]:
    """The cost of every split of a step over the GPUs, the highest rate first.

    Args:
        hf: the model.
        tokens: of one sequence or pack.
        gpus: how many; they are split between all kinds of parallelism.
    """
    model = _Model(hf, tokens)
    found = [model.cost(split) for split in _splits(hf, gpus) if model.balance(split.pp)]
    return sorted(found, key=lambda cost: (-cost.rate, cost.gib))


def _splits(hf: HFConfig, gpus: int) -> Iterator[ParallelSplit]:
    sizes = [2**n for n in range(gpus.bit_length()) if gpus % 2**n == 0]
    for pp in (size for size in sizes if size <= hf.num_hidden_layers):
        for tp in (size for size in sizes if size <= GPUS_OF_A_HOST):
            for cp in sizes:
                if gpus % (pp * tp * cp) or hf.num_attention_heads % tp:
                    continue
                for ep in sizes:
                    if gpus // pp % ep == 0 and hf.n_routed_experts % ep == 0:
                        yield ParallelSplit(tp, cp, ep, pp, gpus // (pp * tp * cp))


class _Model:
    """A model and the length of its sequences."""

    def __init__(self, hf: HFConfig, tokens: int) -> None:
        self.hf, self.tokens = hf, tokens
        self.costs = estimate(hf, tokens)
        self._balances: dict[int, float] = {}

    def balance(self, pp: int) -> float:
        """The mean of the stages' time, as a share of the slowest; 0 if no split is valid."""
        if pp not in self._balances:
            try:
                (best,) = best_splits(
                    self.hf.schedule, pp, self.costs.layers, after=self.costs.output, count=1
                )
                balance = sum(best.times) / pp / best.bottleneck
            except PipelineSplitError:
                balance = 0.0
            self._balances[pp] = balance
        return self._balances[pp]

    def cost(self, split: ParallelSplit) -> ParallelCost:
        ranks = split.tp * split.cp
        layers = self.hf.num_hidden_layers
        moe_layers = sum(self.hf.moe_layers)
        ideal = PASSES * self.tokens * (sum(self.costs.layers) + self.costs.output) / FLOPS
        spent = ideal / ranks + layers * (ranks > 1) * SMALL_PARTS
        spent += EXCHANGES * layers * (self._tensor(split) + self._context(split))
        spent += EXCHANGES * moe_layers * self._expert(split)
        rate = ideal / ranks / spent * self.balance(split.pp)
        return ParallelCost(split, rate, self._bytes(split) / 2**30, self.tokens // ranks)

    def _tensor(self, split: ParallelSplit) -> float:
        """Seconds of a layer's forward: hidden states and query latents gathered, outputs
        scattered, queries and outputs exchanged, up-projections, latents and index keys
        gathered."""
        hf, tp = self.hf, split.tp
        if tp == 1:
            return 0.0
        own = self.tokens / split.cp  # of the tensor-parallel group
        heads = hf.num_attention_heads
        qk, value = hf.qk_nope_head_dim + hf.qk_rope_head_dim, hf.v_head_dim
        numbers = own * (hf.q_lora_rank + 3 * hf.hidden_size + self._key_width)
        numbers += own / tp * heads * (qk + value)
        numbers += heads * (hf.qk_nope_head_dim + value) * hf.kv_lora_rank
        return _seconds(2 * numbers, tp, collectives=8, spans=tp)

    def _context(self, split: ParallelSplit) -> float:
        """Seconds of a layer's forward: latents and index keys gathered."""
        spans = split.tp * split.cp
        return _seconds(2 * self.tokens * self._key_width, split.cp, collectives=2, spans=spans)

    def _expert(self, split: ParallelSplit) -> float:
        """Seconds of a layer's forward: tokens sent to their experts and back."""
        own = self.tokens / (split.tp * split.cp)
        numbers = 2 * own * self.hf.num_experts_per_tok * self.hf.hidden_size
        return _seconds(2 * numbers, split.ep, collectives=2, spans=split.ep)

    @property
    def _key_width(self) -> int:
        return self.hf.kv_lora_rank + self.hf.qk_rope_head_dim + self.hf.index_head_dim

    def _bytes(self, split: ParallelSplit) -> float:
        """Weights in bf16 and gradients in fp32 where they are; fp32 weights and two moments
        shared out by the distributed optimizer; activations of full recompute."""
        hf = self.hf
        experts = 3 * hf.hidden_size * hf.moe_intermediate_size * hf.n_routed_experts
        experts *= sum(hf.moe_layers)
        active = sum(estimate(hf, 0).layers) / 2 - experts / hf.n_routed_experts * (
            hf.num_experts_per_tok
        )
        others = active + 2 * hf.vocab_size * hf.hidden_size
        held = others / (split.tp * split.pp) + experts / (split.ep * split.pp)
        ranks = split.tp * split.cp * split.dp * split.pp
        states = 12 * (others + experts) / ranks
        own = self.tokens / (split.tp * split.cp)
        kept = own * (2 * hf.hidden_size * hf.num_hidden_layers / split.pp)
        topk = topk_bytes_per_token(hf.index_topk, self.tokens)
        kept += own * topk * len(hf.schedule.computing_layers) / split.pp
        qk, value = hf.qk_nope_head_dim + hf.qk_rope_head_dim, hf.v_head_dim
        at_once = 16 * hf.num_attention_heads * (qk + value)
        at_once += 8 * hf.num_experts_per_tok * hf.hidden_size
        in_flight = split.pp  # microbatches whose activations the first stage keeps
        return 6 * held + states + kept * in_flight + own * at_once


def _seconds(sent: float, ranks: int, *, collectives: int, spans: int) -> float:
    """Of collectives between ranks.

    Args:
        sent: bytes, all ranks' parts together of a gather, a rank's own of an all-to-all.
        ranks: how many take part.
        collectives: how many there are.
        spans: GPUs next to each other that the ranks are spread over.
    """
    if ranks == 1:
        return 0.0
    link = NVLINK if spans <= GPUS_OF_A_HOST else NETWORK
    return collectives * LATENCY + sent * (ranks - 1) / ranks / link
