"""The table of docs/pipeline.md: how even the stages of GLM-5.2 can be.

python -m tests.config.balance
"""

from __future__ import annotations

from pathlib import Path

from glm5_patch.config.costs import estimate
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.pipeline_split import Split, best_splits

CONFIG = Path(__file__).parents[1] / "configs" / "glm-5.2.json"
SIZES = range(4, 21)
SEQ_LENGTH = 8192


def best(pp: int, any_layer: bool) -> Split:
    hf = HFConfig.from_file(CONFIG)
    costs = estimate(hf, SEQ_LENGTH)
    (split,) = best_splits(
        hf.schedule,
        pp,
        costs.layers,
        before=costs.embedding,
        after=costs.output,
        any_layer=any_layer,
    )
    return split


def imbalance(split: Split) -> float:
    """The slowest chunk over the mean."""
    return split.bottleneck * len(split.times) / sum(split.times)


def table() -> str:
    rows = ["| PP | starts on computing layers | starts on any layer | its layers |"]
    rows.append("|---" * 4 + "|")
    for pp in SIZES:
        free = best(pp, any_layer=True)
        layers = ", ".join(map(str, free.sizes))
        bound = imbalance(best(pp, any_layer=False))
        rows.append(f"| {pp} | {bound:.2f} | {imbalance(free):.2f} | {layers} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
