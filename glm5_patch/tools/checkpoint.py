"""``glm5-patch checkpoint``: is a checkpoint complete, are its indexers in order?"""

from __future__ import annotations

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.indexer_order import ROPE_FIRST, Found, find_orders
from ..checkpoint.indexer_order import convert as convert_order
from ..errors import CheckpointError
from .report import Result, print_text, progress

UNKNOWN = (
    "one checkpoint does not show the order of its indexers; give --like DIR, a related checkpoint "
    "in Hugging Face's order (the published model)"
)


def check(directory: str, like: str | None) -> Result:
    """Check names and shapes and, with a related checkpoint, the order of the indexers."""
    if like:
        from ..checkpoint.reader import HFCheckpoint

        checkpoint = HFCheckpoint(directory)
        found = find_orders(checkpoint, HFCheckpoint(like))
    else:  # headers alone, without torch
        checkpoint = CheckpointFiles(directory)
        found = find_orders(checkpoint)
    report = checkpoint.report
    right = found is None or found.order == ROPE_FIRST
    data = {
        "schedule": str(checkpoint.config.schedule),
        "tensors": report.tensors,
        "computing_layers": report.computing_layers,
        "skip_layers": report.skip_layers,
        "dropped": report.dropped,
        "mtp": report.mtp,
        "dequantized": report.dequantized,
        **_order_data(found),
    }

    def show() -> None:
        print_text(f"{checkpoint.config.schedule}: {report}")
        print_text(f"order of the indexers: {found or f'unknown: {UNKNOWN}'}")
        if not right:
            option = f"--like {like}" if like else f"--from {found.order}"
            print(f"to convert it: glm5-patch checkpoint convert {directory} OUTPUT {option}")

    return Result(int(not right), data, show)


def convert(directory: str, output: str, to: str, like: str | None, given: str | None) -> Result:
    """Move the rotary dimensions of the indexers that are not in the order ``to``.

    Raises:
        CheckpointError: the checkpoint is incomplete, or its present order is unknown.
    """
    from ..checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(directory)
    report = checkpoint.report
    found = find_orders(checkpoint, HFCheckpoint(like) if like else None, given)
    if found is None:
        raise CheckpointError(
            f"{directory}: nothing was written: {UNKNOWN}, or --from ORDER if you know it"
        )
    with progress("converting", len(set(checkpoint.files.values()))) as advance:
        done = convert_order(checkpoint, output, to, found, advance)
    data = {
        **_order_data(found),
        "to": to,
        "layers": done.layers,
        "tensors": done.tensors,
        "output": output if done.layers else None,
    }

    def show() -> None:
        print_text(f"{directory}: {report}")
        print_text(f"found: {found}")
        if done.layers:
            layers = ", ".join(map(str, done.layers))
            print_text(f"{output}: {done.tensors} tensors of layers {layers} are {to}")
        else:
            print_text(f"nothing was written: every indexer is {to} already")

    return Result(0, data, show)


def dequantize(directory: str, output: str) -> Result:
    """Write a block FP8 checkpoint in bf16.

    Raises:
        CheckpointError: the checkpoint is incomplete, or has no float8 tensor.
    """
    from ..checkpoint.dequantize import write_dequantized
    from ..checkpoint.reader import HFCheckpoint

    checkpoint = HFCheckpoint(directory)
    report = checkpoint.report
    with progress("dequantizing", len(checkpoint.headers)) as advance:
        tensors = write_dequantized(checkpoint, output, advance)

    def show() -> None:
        print_text(f"{directory}: {report}")
        print_text(f"{output}: {tensors} tensors are bf16")

    return Result(0, {"output": output, "tensors": tensors}, show)


def _order_data(found: Found | None) -> dict:
    return {
        "indexer_order": found and found.order,
        "indexer_orders": found and found.orders,
        "known_by": found and found.how,
    }
