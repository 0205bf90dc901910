"""``glm5-patch plan --tokens S --gpus N``: which kinds of parallelism cost least."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ...config.huggingface import HFConfig
from ...config.parallel_costs import FEW_TOKENS, ParallelCost, parallel_costs
from ..report import Result, print_flags, print_table, print_text


def run(hf: HFConfig, options: argparse.Namespace) -> Result:
    """The splits of a step over the GPUs, those that fit first, by rate."""
    costs = parallel_costs(hf, options.tokens, options.gpus)
    fitting = [cost for cost in costs if cost.gib <= options.gpu_memory]
    shown = (fitting or costs)[: options.top]
    data = {
        "tokens": options.tokens,
        "gpus": options.gpus,
        "gpu_memory": options.gpu_memory,
        "fits": bool(fitting),
        "splits": [describe(cost) for cost in shown],
        "one_kind": {kind: describe(cost) for kind, cost in _one_kind(fitting or costs).items()},
    }
    return Result(0, data, lambda: _print(data, costs))


def _one_kind(costs: list[ParallelCost]) -> dict[str, ParallelCost]:
    """The best split that splits sequences in one way, or not at all."""
    kinds = {
        "neither TP nor CP": lambda split: split.tp == split.cp == 1,
        "TP": lambda split: split.tp > 1 == split.cp,
        "CP": lambda split: split.cp > 1 == split.tp,
        "TP and CP": lambda split: split.tp > 1 < split.cp,
    }
    best = {}
    for kind, is_of in kinds.items():
        of_kind = [cost for cost in costs if is_of(cost.split)]
        if of_kind:
            best[kind] = of_kind[0]
    return best


def describe(cost: ParallelCost) -> dict:
    """One split: sizes, estimates, and the settings for Megatron."""
    split = cost.split
    flags = {
        "--tensor-model-parallel-size": split.tp,
        "--context-parallel-size": split.cp,
        "--expert-model-parallel-size": split.ep,
        "--expert-tensor-parallel-size": 1,
        "--pipeline-model-parallel-size": split.pp,
    }
    if split.cp > 1:
        flags["--cp-comm-type"] = "allgather"  # the default is refused
    return {
        **asdict(split),
        "rate": round(cost.rate, 3),
        "gib": round(cost.gib, 1),
        "tokens_per_gpu": cost.tokens,
        "megatron_flags": flags,
        "sequence_parallel": split.tp > 1,
    }


def _print(data: dict, costs: list[ParallelCost]) -> None:
    print_text(
        f"{data['gpus']} GPUs, sequences of {data['tokens']} tokens; estimated from rates measured "
        "on H100s, full recompute, distributed optimizer. Rates are shares of one GPU's, tokens "
        "and memory those of a GPU"
    )
    if not data["fits"]:
        least = min(cost.gib for cost in costs)
        print_text(
            f"no split fits into {data['gpu_memory']:g} GiB: the smallest takes {least:.0f} GiB a "
            "GPU. Use more GPUs, or offload the optimizer; the rates hold either way"
        )
    print_table(
        _HEADS,
        [(f"{n}.", *_cells(split)) for n, split in enumerate(data["splits"], 1)],
    )
    print("\nthe best that splits a sequence by")
    print_table(
        _HEADS,
        [(kind, *_cells(split)) for kind, split in data["one_kind"].items()],
    )
    print("")
    shown = [*data["splits"], *data["one_kind"].values()]
    if any(split["tokens_per_gpu"] < FEW_TOKENS for split in shown):
        print_text(_FEW_TOKENS_SLOW)
        print("")
    print_text("Megatron-LM, the first one:")
    best = data["splits"][0]
    switches = {"--sequence-parallel": True} if best["sequence_parallel"] else {}
    print_flags({**best["megatron_flags"], **switches})
    if best["pp"] > 1:
        print_text(f"its stages: glm5-patch plan --config ... --pp {best['pp']}")


_FEW_TOKENS_SLOW = (
    f"Where a GPU has fewer than {FEW_TOKENS} tokens of a microbatch, the CPU may launch kernels "
    "more slowly than the GPU runs them, and the rate is lower than estimated: pack longer "
    "sequences, or raise Megatron's micro batch size"
)
_HEADS = ("", "TP", "CP", "EP", "PP", "DP", "rate", "tokens", "memory")


def _cells(split: dict) -> tuple:
    """A pipe gets no column heads, so each cell says what it is."""
    sizes = (f"{name.upper()} {split[name]}" for name in ("tp", "cp", "ep", "pp", "dp"))
    return (
        *sizes,
        f"rate {split['rate']:.0%}",
        f"{split['tokens_per_gpu']} tokens",
        f"{split['gib']:.0f} GiB",
    )
