"""The worked examples run, and show what they say."""

import importlib.util
from pathlib import Path

from tests.tiny import saved

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_step_on_the_keys_of_the_rollout(world, our_core, tmp_path):
    spec = importlib.util.spec_from_file_location("rl_replay", EXAMPLES / "rl_replay.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.train(saved(tmp_path))
    assert found["ratio, smallest"] == found["ratio, largest"] == 1.0
    assert found["ratio after the step, largest"] != 1.0
    assert found["keys that the trainer would have selected"] < 1
    replayed, own = (
        found[f"log-probabilities off the server's, {keys}"] for keys in ("replayed", "own keys")
    )
    assert replayed < 1e-4 < own
