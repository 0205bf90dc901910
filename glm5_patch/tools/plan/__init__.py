"""``glm5-patch plan``: how to split a checkpoint's model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...config.huggingface import HFConfig
from ..report import Result
from . import parallel, pipeline


def run(options: argparse.Namespace) -> Result:
    """Compare all splits of so many GPUs, or the pipeline splits alone.

    Raises:
        CheckpointError: the configuration can't be read.
        PipelineSplitError: no pipeline split is valid.
    """
    path = Path(options.config)
    hf = HFConfig.from_directory(path) if path.is_dir() else HFConfig.from_file(path)
    if options.indexer_types:
        pattern = {"indexer_types": None, "index_topk_pattern": options.indexer_types}
        hf = HFConfig({**hf.raw, **pattern})
    return parallel.run(hf, options) if options.gpus else pipeline.run(hf, options)
