"""``glm5-patch demo``: verify, train and save a model that is small enough for a laptop.

After the checks of ``verify`` it trains under full recompute with two microbatches in flight, and
writes a checkpoint that transformers reads back.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from ..checkpoint.staging import free_directory
from ..checkpoint.writer import save
from .report import Result, progress, say
from .verify import Report, Session, check_loaded, compare, losses, session


def run(options: argparse.Namespace) -> Result:
    """Compare, train, save and compare again.

    Raises:
        GLM5PatchError: an option or the checkpoint is unusable; nothing was written.
    """
    if options.output:
        _check_writable(free_directory(options.output))
    with session(options) as opened:
        check_loaded(opened)
        _train(opened.model, opened.ids, options.steps, opened.report)
        _save_and_read_back(opened, options.output)
    opened.report.output = options.output
    return opened.report.result()


def _check_writable(output: Path) -> None:
    """Raise OSError before training and not after it."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".glm5-patch-", dir=folder):
        pass


def _save_and_read_back(opened: Session, output: str | None) -> None:
    directory = Path(output) if output else opened.scratch / "trained"
    save(opened.model, opened.checkpoint.config, directory, opened.checkpoint)
    say("transformers: reading the trained checkpoint back")
    compare(opened, directory, microbatch=1, label="trained")


def _train(model, ids, steps: int, report: Report) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with progress("training", steps, every=5) as advance:
        for _ in range(steps):
            optimizer.zero_grad()
            found = losses(model, ids)
            for loss in found:
                (loss / len(found)).backward()
            optimizer.step()
            report.losses.append(sum(loss.item() for loss in found) / len(found))
            advance(f"loss {report.losses[-1]:.3f}")
    first, last = report.losses[0], report.losses[-1]
    report.check(
        f"{steps} training steps: the loss falls",
        f"{first:.3f} -> {last:.3f}",
        "lower",
        last < first or steps == 1,
    )
