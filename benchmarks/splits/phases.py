"""Where the time of one step goes on a GPU, from the kernels that torch's profiler saw.

Kernels of one GPU overlap where they run in different streams, so the times of kinds of kernels are
sums, and what is idle or exposed is worked out from intervals. The products of experts have the
names of all others: ``marked`` starts a kernel of no work before and after the experts. Between
these every product counts as theirs, since Transformer Engine's run in several streams; so do those
of shared experts that run beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

COMMUNICATION, EXPERTS, PRODUCTS, REST = "communication", "experts", "products", "rest"
KINDS = {
    COMMUNICATION: "nccl",
    "attention": "^(forward|(union_)?(backward|bounds)|mark|unite|row_terms|project|rotate)$"
    "|^flat_keys$|flash|fmha|sdpa",
    "selection": "^(quantize|scores|bars|candidates|topk|(scores_and_)?topk_of_misled)$"
    "|^(head_sums|loss)$|(radix|bitonic|segmented|merge)sort",
    PRODUCTS: "gemm|nvjet|cutlass|xmma",
}
"""Patterns of the names of kernels, the first that fits; "selection" has the indexer's loss, and
"products" are those of no experts. What fits none is the rest."""
MARK = "spin_kernel"
"""Part of the name of the kernel of ``torch.cuda._sleep``."""
LAUNCH = re.compile(r"^cu(da)?Launch")
NO_WORK = re.compile(r"^(Context|Stream|Event) (Sync|Wait)")
"""What some releases of torch list among a GPU's kernels."""
WAIT = re.compile(r"^cuda(Stream|Event|Device)Synchronize")


class Event(NamedTuple):
    """Of a GPU, or of a call that the host made to its driver."""

    name: str
    start: int
    """In ns, as ``end``."""
    end: int
    on_gpu: bool
    stream: int = 0


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What intervals cover, as intervals apart from each other, in order."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[tuple[int, int]]) -> int:
    """What intervals cover together."""
    return sum(end - start for start, end in union(spans))


def without(spans: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> int:
    """What intervals cover and the others do not."""
    others = list(others)
    return length([*spans, *others]) - length(others)


def breakdown(events: Sequence[Event], wall: float) -> dict[str, float | int]:
    """Milliseconds of a step by phase, and how often the host launched kernels and waited.

    Args:
        events: of one step.
        wall: ms of a step without the profiler, which slows down the host and no kernel.
    """
    on_gpu = sorted((event for event in events if event.on_gpu), key=lambda event: event.start)
    kernels = [event for event in on_gpu if MARK not in event.name]
    marks = [event for event in on_gpu if MARK in event.name]
    streams = {mark.stream for mark in marks}
    pairs = list(zip((mark.start for mark in marks[::2]), (mark.start for mark in marks[1::2])))
    spans: dict[str, list[tuple[int, int]]] = {
        kind: [] for kind in (*KINDS, EXPERTS, REST) if kind != EXPERTS or pairs
    }
    between = iter(pairs)
    pair = next(between, None)
    for kernel in kernels:
        while pair is not None and pair[1] <= kernel.start:
            pair = next(between, None)
        marked, kind = pair is not None and pair[0] <= kernel.start, _kind(kernel.name)
        of_experts = kind == PRODUCTS or (kind == REST and kernel.stream in streams)
        spans[EXPERTS if marked and of_experts else kind].append(kernel[1:3])
    working = [span for kind, found in spans.items() if kind != COMMUNICATION for span in found]
    busy = length(kernel[1:3] for kernel in kernels)
    calls = [event for event in events if not event.on_gpu]
    launches = [call.start for call in calls if LAUNCH.match(call.name)]
    last = max(launches, default=0)
    waits = sum(bool(WAIT.match(call.name)) and call.start < last for call in calls)
    times = {f"{kind} ms": sum(end - start for start, end in spans[kind]) for kind in spans}
    times["exposed communication ms"] = without(spans[COMMUNICATION], working)
    times["idle ms"] = max(0.0, wall * 1e6 - busy)
    return {
        **{name: round(time / 1e6, 1) for name, time in times.items()},
        "launches": len(launches) - len(marks),
        "host waits": waits,
    }


def of_ranks(breakdowns: Sequence[dict[str, float | int]]) -> dict[str, float | int]:
    """The mean of all ranks' breakdowns, and the work of the rank that has most. A stage without
    experts has no such phase."""
    names = dict.fromkeys(name for found in breakdowns for name in found)
    mean = {
        name: round(sum(found.get(name, 0) for found in breakdowns) / len(breakdowns), 1)
        for name in names
    }
    work = [f"{kind} ms" for kind in (*KINDS, EXPERTS, REST) if kind != COMMUNICATION]
    most = max(sum(found.get(name, 0.0) for name in work) for found in breakdowns)
    return {**mean, "most work of a rank ms": round(most, 1)}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), REST)


@contextmanager
def marked(modules: Iterable[torch.nn.Module], mark: Callable[[], None]):
    """Call ``mark`` before and after the forward and the backward of each module."""

    def before(*_):
        mark()

    def after(*_):
        mark()

    with ExitStack() as undo:
        for module in modules:
            for handle in (
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
                module.register_full_backward_pre_hook(before),
                module.register_full_backward_hook(after),
            ):
                undo.callback(handle.remove)
        yield


def profiled(step: Callable[[], None], experts: Iterable[torch.nn.Module]) -> list[Event]:
    """The events of one step on this rank's GPU; no trace is written.

    Args:
        step: runs it.
        experts: the modules that hold the experts of a layer.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with (
        marked(experts, lambda: torch.cuda._sleep(1)),
        profile(activities=[ProfilerActivity.CUDA]) as found,
    ):
        step()
    events = found.profiler.kineto_results.events()
    return [
        Event(
            event.name(),
            event.start_ns(),
            event.start_ns() + event.duration_ns(),
            event.device_type() == DeviceType.CUDA,
            event.device_resource_id(),
        )
        for event in events
        if not NO_WORK.search(event.name())
    ]
