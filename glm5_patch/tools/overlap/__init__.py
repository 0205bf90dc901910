"""``glm5-patch overlap``: which layers of a checkpoint select alike, and may share a top-k."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.index_pattern import Pattern, best_pattern
from ...errors import CheckpointError, GLM5PatchError
from ..report import Result, print_table, print_text, progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from ...checkpoint.reader import HFCheckpoint
    from ...config.huggingface import HFConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def run(options: argparse.Namespace) -> Result:
    """Compare the selections of all computing layers on a text.

    Raises:
        GLM5PatchError: an option, the checkpoint or the text is unusable.
    """
    if not 0 < options.keep <= 1:
        raise GLM5PatchError(f"--keep {options.keep} must be above 0 and at most 1")
    if options.heat_map:  # before the work, not after it
        _pyplot()
        if not Path(options.heat_map).absolute().parent.is_dir():
            raise GLM5PatchError(f"--heat-map {options.heat_map}: its directory does not exist")
    import glm5_patch

    from ...checkpoint.reader import HFCheckpoint

    glm5_patch.require()  # before a host is imported
    checkpoint = HFCheckpoint(Path(options.checkpoint))
    hf = checkpoint.config
    length = options.seq_length or min(4 * hf.index_topk, hf.max_position_embeddings)
    ids = _sequences(checkpoint, Path(options.text), length, options.sequences)
    overlap = _overlaps(checkpoint, ids, options)
    keep = max(1, math.ceil(options.keep * len(hf.schedule.computing_layers)))
    pattern = best_pattern(hf.schedule, overlap, keep)
    if options.heat_map:
        _draw(overlap, hf, Path(options.heat_map))
    data = {
        "layers": hf.num_hidden_layers,
        "computing_layers": list(hf.schedule.computing_layers),
        "sequences": list(ids.shape),
        "overlap": [[round(share, 4) for share in row] for row in overlap],
        "keep": keep,
        "pattern": pattern.schedule.letters,
        "mean_overlap": round(pattern.mean_overlap, 4),
        "layer_overlap": [round(share, 4) for share in pattern.overlaps],
        "heat_map": options.heat_map,
    }
    return Result(0, data, lambda: _print(data, pattern))


def _sequences(checkpoint: HFCheckpoint, text: Path, length: int, most: int) -> Tensor:
    """Tokens of a text in sequences of one length, int64 [sequences, length]."""
    import torch

    hf = checkpoint.config
    if length <= hf.index_topk:
        raise GLM5PatchError(
            f"--seq-length {length} must be above index_topk={hf.index_topk}: shorter sequences "
            "select every key, and all layers alike"
        )
    tokens = _tokens(checkpoint.directory, text, hf.vocab_size)
    sequences = min(most, len(tokens) // length)
    if not sequences:
        raise GLM5PatchError(
            f"{text} has {len(tokens)} tokens, and one sequence takes {length}; give a longer text "
            f"or a smaller --seq-length (above index_topk={hf.index_topk})"
        )
    return torch.tensor(tokens[: sequences * length]).view(sequences, length)


def _tokens(directory: Path, text: Path, vocab_size: int) -> list[int]:
    """Of the checkpoint's tokenizer if it has one, else the bytes."""
    if any((directory / name).exists() for name in TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except Exception as error:  # whatever a tokenizer of somebody else's raises
            raise CheckpointError(
                f"the tokenizer of {directory} does not load: {type(error).__name__}: {error}"
            ) from error
        words = text.read_text(encoding="utf-8", errors="replace")
        return tokenizer(words, add_special_tokens=False)["input_ids"]
    say(f"{directory} has no tokenizer: a token is a byte, modulo vocab_size={vocab_size}")
    return [byte % vocab_size for byte in text.read_bytes()]


def _overlaps(
    checkpoint: HFCheckpoint, ids: Tensor, options: argparse.Namespace
) -> list[list[float]]:
    """[layers][layers]: the share of the first one's keys that the second selects too, of queries
    that see more keys than they select."""
    import torch

    from ...ops.query_positions import common_keys
    from ...testing.cpu_host import single_process
    from ...testing.parity import recorded
    from ..verify import forward, to_load_into
    from .layer_by_layer import LayerByLayer

    schedule = checkpoint.config.schedule
    computing, first = schedule.computing_layers, checkpoint.config.index_topk
    shared = torch.zeros(len(computing), len(computing))
    with single_process(options.device):
        settings = to_load_into(options.device, options.dtype)
        model = LayerByLayer(checkpoint, options.device, settings)
        with progress("layers", schedule.num_layers) as advance, torch.no_grad():
            with model.loaded(advance) as running, recorded(running) as found:
                forward(running, ids.to(options.device))
        for sequence in range(len(ids)):
            chosen = [found.topk_indices[number][sequence, None, first:] for number in computing]
            for row, one in enumerate(chosen):
                for column, other in enumerate(chosen):
                    same, of = common_keys(other, one)
                    shared[row, column] += (same / of / len(ids)).cpu()
    place = {number: n for n, number in enumerate(computing)}
    sources = [place[schedule.source(n)] for n in range(1, schedule.num_layers + 1)]
    return [[shared[one, other].item() for other in sources] for one in sources]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise GLM5PatchError(
            "--heat-map needs matplotlib, which is not installed; pip install 'glm5-patch[plot]'"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _draw(overlap: list[list[float]], hf: HFConfig, path: Path) -> None:
    """A heat map of the computing layers."""
    pyplot = _pyplot()
    numbers = hf.schedule.computing_layers
    shares = [[overlap[one - 1][other - 1] for other in numbers] for one in numbers]
    side = max(4.0, 0.22 * len(numbers) + 2)
    figure, axes = pyplot.subplots(figsize=(side + 1, side))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(numbers)), numbers, rotation=90, fontsize=7)
    axes.set_yticks(range(len(numbers)), numbers, fontsize=7)
    axes.set_xlabel("layer whose selection has them too")
    axes.set_ylabel("layer that selects the keys")
    figure.colorbar(image, label="share of the keys")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _print(data: dict, pattern: Pattern) -> None:
    overlap, computing = data["overlap"], data["computing_layers"]
    rows = []
    for place, number in enumerate(computing):
        before = computing[:place]
        if not before:
            rows.append((f"layer {number}", "", "", "F"))
            continue
        alike = max(before, key=lambda other: overlap[number - 1][other - 1])
        rows.append(
            (
                f"layer {number}",
                f"{overlap[number - 1][before[-1] - 1]:.3f} of layer {before[-1]}",
                f"{overlap[number - 1][alike - 1]:.3f} of layer {alike}",
                pattern.schedule.letters[number - 1],
            )
        )
    columns = ("keys of", "computing layer before", "most alike before", "pattern")
    print_table(columns, rows)
    sequences, length = data["sequences"]
    print_text(f"measured on {sequences} sequences of {length} tokens")
    print_text(
        f"best pattern that keeps {data['keep']} of {len(computing)} indexers, with a mean overlap "
        f"of {data['mean_overlap']:.3f}:"
    )
    print(f"  --dsa-indexer-types {data['pattern']}")
    print(f'  "index_topk_pattern": "{data["pattern"]}"')
    if data["heat_map"]:
        print(f"the heat map is in {data['heat_map']}")
