"""``glm5-patch plan --pp``: the valid pipeline splits of a checkpoint, best first."""

from __future__ import annotations

import argparse
import itertools

from ...config.costs import estimate, topk_bytes_per_token
from ...config.fields import ACROSS_STAGES
from ...config.huggingface import HFConfig
from ...config.hybrid import layer_pattern
from ...config.pipeline_split import (
    Split,
    best_splits,
    check_split,
    chunk_label,
    equal_middle_split,
)
from ...config.schedule import IndexSchedule
from ...errors import PipelineSplitError
from ..report import Result, print_flags, print_table, print_text

FLAG = "--" + ACROSS_STAGES.replace("_", "-")


def run(hf: HFConfig, options: argparse.Namespace) -> Result:
    """The plans, best first.

    Raises:
        PipelineSplitError: no split is valid.
    """
    costs = estimate(hf, options.seq_length)
    chunks = options.pp * options.vpp
    crosses = options.topk_across_stages
    splits = best_splits(
        hf.schedule,
        chunks,
        costs.layers,
        before=costs.embedding,
        after=costs.output + (costs.mtp if options.mtp else 0.0),
        count=options.top,
        any_layer=crosses,
    )
    plans = [describe(split, options.pp, options.vpp, options.mtp) for split in splits]
    for plan in plans:
        plan["hybrid_layer_pattern"] = layer_pattern(hf, plan["layers"], int(options.mtp))
    data = {
        "schedule": str(hf.schedule),
        "uniform": why_not_uniform(hf.schedule, options.pp, options.vpp, crosses),
        "plans": plans,
        "first_and_last": None,
    }
    if options.vpp == 1 and not options.mtp:
        data["first_and_last"] = first_and_last(hf.schedule, options.pp, crosses)
    if crosses:
        per_token = topk_bytes_per_token(hf.index_topk, options.seq_length)
        for plan in filter(None, (*plans, data["first_and_last"])):
            _add_crossings(plan, hf.schedule, per_token)
    return Result(0, data, lambda: _print(data, splits[0], hf.schedule, options))


def why_not_uniform(
    schedule: IndexSchedule, pp: int, vpp: int = 1, any_layer: bool = False
) -> str | None:
    """Why equal chunks are refused; None if they are valid."""
    chunks = pp * vpp
    if schedule.num_layers % chunks:
        return f"{schedule.num_layers} layers do not divide into {chunks} equal chunks"
    if any_layer:
        return None
    size = schedule.num_layers // chunks
    pieces = [range(i * size + 1, (i + 1) * size + 1) for i in range(chunks)]
    try:
        check_split(schedule, pieces, [_label(i, pp, vpp) for i in range(chunks)])
    except PipelineSplitError as error:
        return str(error).partition(";")[0]
    return None


def layout(split: Split, mtp: bool = False) -> str:
    """The value of ``--pipeline-model-parallel-layout``."""
    chunks = [f"t*{size}" if size else "" for size in split.sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "mL" if mtp else "L"
    return "|".join(chunks)


def describe(split: Split, pp: int, vpp: int, mtp: bool) -> dict:
    """One plan: sizes, estimated balance, and the settings for Megatron and Bridge."""
    mean = sum(split.times) / len(split.times)
    flags = {
        "--pipeline-model-parallel-size": pp,
        "--pipeline-model-parallel-layout": layout(split, mtp),
    }
    provider: dict = {
        "pipeline_model_parallel_size": pp,
        "pipeline_model_parallel_layout": layout(split, mtp),
    }
    if vpp > 1:
        provider["virtual_pipeline_model_parallel_size"] = vpp
    return {
        "layers": list(split.sizes),
        "slowest_over_mean": round(split.bottleneck / mean, 3),
        "empty_chunks": split.sizes.count(0),
        "megatron_flags": flags,
        "bridge_provider": provider,
    }


def _add_crossings(plan: dict, schedule: IndexSchedule, per_token: int) -> None:
    """What each chunk sends beside the hidden states, and the switch that lets it."""
    crosses = [
        0 < end < schedule.num_layers and not schedule.computes(end + 1)
        for end in list(itertools.accumulate(plan["layers"]))[:-1]
    ]
    plan["topk_bytes_per_token"] = [per_token if crossing else 0 for crossing in crosses]
    if any(crosses):
        plan["megatron_flags"][FLAG] = True
        plan["bridge_provider"][ACROSS_STAGES] = True


def first_and_last(schedule: IndexSchedule, pp: int, any_layer: bool = False) -> dict | None:
    """The most even split that a first and a last count describe, without a layout."""
    sizes = equal_middle_split(schedule, pp, any_layer)
    return sizes and {
        "layers": sizes,
        "megatron_flags": {
            "--pipeline-model-parallel-size": pp,
            "--decoder-first-pipeline-num-layers": sizes[0],
            "--decoder-last-pipeline-num-layers": sizes[-1],
        },
        "bridge_provider": {
            "pipeline_model_parallel_size": pp,
            "num_layers_in_first_pipeline_stage": sizes[0],
            "num_layers_in_last_pipeline_stage": sizes[-1],
        },
    }


def _label(chunk: int, pp: int, vpp: int) -> str:
    return chunk_label(chunk % pp, chunk // pp if vpp > 1 else None)


def _print(report: dict, best: Split, schedule: IndexSchedule, options) -> None:
    chunks = "1 chunk" if options.vpp == 1 else f"{options.vpp} chunks"
    print_text(f"{report['schedule']}; pipeline size {options.pp}, {chunks} a stage")
    if report["uniform"]:
        print_text(f"equal chunks are refused: {report['uniform']}")
    empty = best.sizes.count(0)
    if empty:
        print_text(
            f"{empty} chunks stay empty: {_most_chunks(schedule, options.topk_across_stages)}; "
            "a smaller pipeline size times virtual stages leaves none empty"
        )
    print_table(
        ("", "layers of each chunk", "slowest chunk"),
        [
            (
                f"{number}.",
                ", ".join(map(str, plan["layers"])),
                f"{plan['slowest_over_mean']:.2f} x the mean",
            )
            for number, plan in enumerate(report["plans"], 1)
        ],
    )
    print("\nthe first one (F computes its top-k, s reuses it):")
    layer = 1
    mean = sum(best.times) / len(best.times)
    rows = []
    for chunk, (size, time) in enumerate(zip(best.sizes, best.times)):
        marks = "".join("F" if schedule.computes(n) else "s" for n in range(layer, layer + size))
        layer += size
        label = _label(chunk, options.pp, options.vpp)
        rows.append((label, marks, f"{size} layers", f"{time / mean:.2f}"))
    print_table(("chunk", "layers", "", "time / mean"), rows)
    if options.topk_across_stages:
        print_text(_what_is_sent(report["plans"][0]["topk_bytes_per_token"]))
    _print_settings("with a layout", report["plans"][0])
    if report["first_and_last"]:
        sizes = ", ".join(map(str, report["first_and_last"]["layers"]))
        _print_settings(f"or with first and last counts ({sizes})", report["first_and_last"])
    print("")
    print_text("as a HybridModel, in the place of a layout:")
    print_flags({"--hybrid-layer-pattern": report["plans"][0]["hybrid_layer_pattern"]})


def _most_chunks(schedule: IndexSchedule, any_layer: bool) -> str:
    if any_layer:
        return f"the model has {schedule.num_layers} layers"
    return f"at most {len(schedule.computing_layers)} chunks can start on a computing layer"


def _what_is_sent(per_token: list[int]) -> str:
    """Of one plan."""
    sent = [size for size in per_token if size]
    if not sent:
        return "no boundary carries a top-k"
    return (
        f"{len(sent)} of {len(per_token)} boundaries carry the top-k: {sent[0] / 1024:g} KiB a "
        "token beside the hidden states"
    )


def _print_settings(title: str, plan: dict) -> None:
    print("")
    print_text(f"Megatron-LM, {title}:")
    print_flags(plan["megatron_flags"])
    print_text(f"Megatron-Bridge provider, {title}:")
    for name, value in plan["bridge_provider"].items():
        print(f"  {name} = {value!r}")
