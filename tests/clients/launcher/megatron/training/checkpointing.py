"""The host's function restores a list of names, of which one is here."""

import pickle
from pathlib import Path


def load_args_from_checkpoint(args, load_arg="load", checkpointing_context=None):
    folder = getattr(args, load_arg)
    if folder is None:
        return args
    saved = pickle.loads(Path(folder, "args.pickle").read_bytes())
    args.num_experts = saved.num_experts
    return args, saved
