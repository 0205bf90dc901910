"""``pretrain_gpt.py`` of a Megatron-LM source tree, on the CPU.

    python -m tests.clients.pretrain SCRIPT ARGUMENTS

runs it with its model made by ``glm5_patch.attention.build`` from the config.json that
``GLM5_TEST_CONFIG`` names, in the place of the one that the script builds.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from glm5_patch.patching.imports import import_host

STEPS = 20
TRAINING = f"""
    --transformer-impl local --use-cpu-initialization --moe-token-dispatcher-type allgather
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-create-attention-mask-in-dataloader
    --seq-length 32 --micro-batch-size 1 --global-batch-size 2 --seed 7
    --train-iters {STEPS} --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
    --mock-data --tokenizer-type NullTokenizer --vocab-size 95 --num-workers 0
    --log-interval 1 --eval-interval 1000 --eval-iters 1
    --mtp-num-layers 1 --dsa-indexer-loss-coeff 0.01
"""
"""Of a toy model, without what its config.json says. The tokenizer adds one token."""

_STEP = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?mtp_1 loss: (\S+) .*?grad norm: (\S+)")
_TEST = re.compile(r"on test set \| lm loss value: (\S+)")


class Run:
    """What one launch printed."""

    def __init__(self, result: subprocess.CompletedProcess):
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        self.output = result.stdout + result.stderr
        found = (step.groups() for step in _STEP.finditer(self.output))
        self.steps = {int(number): values for number, *values in found}
        """Step -> language model loss, MTP loss and norm of the gradients, as printed."""
        self.test_loss = _TEST.findall(self.output)[-1]


def launch(source: str, *arguments: str, module="glm5_patch.testing.cpu_launch", **environment):
    """Run the script with ``TRAINING`` and more arguments in a process of its own."""
    script = str(Path(source) / "pretrain_gpt.py")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, script, *TRAINING.split(), *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def launch_stages(source: str, *arguments: str):
    """Run the script with ``--pipeline-model-parallel-size 2``, one process for each stage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(source) / "pretrain_gpt.py")
    arguments = ("--pipeline-model-parallel-size", "2", *arguments)
    command = ["-W", "ignore", "-m", "glm5_patch.testing.cpu_launch", script]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, *TRAINING.split(), *arguments],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=STAGES_TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = max(abs(rank.returncode) for rank in ranks)
    return subprocess.CompletedProcess(command, failed, "".join(outputs), "")


STAGES_TIMEOUT_S = 900
"""A rank that fails leaves the other waiting."""


def main() -> None:
    import torch

    from glm5_patch.attention.build import gpt_model, transformer_config
    from glm5_patch.config.huggingface import HFConfig
    from glm5_patch.testing.cpu_launch import launch

    hf = HFConfig.from_directory(os.environ["GLM5_TEST_CONFIG"])

    def build(*, pre_process, post_process, **_):
        config = transformer_config(
            hf,
            transformer_impl="local",
            use_cpu_initialization=True,
            params_dtype=torch.float32,
            moe_token_dispatcher_type="allgather",
            mtp_num_layers=1,
            dsa_indexer_loss_coeff=0.01,
        )
        print("the model is built by glm5_patch.attention.build")
        return gpt_model(hf, config, pre_process=pre_process, post_process=post_process)

    script, *arguments = sys.argv[1:]
    sys.path.append(str(Path(script).parent))
    for name in ("gpt_builders", "megatron.training.models.gpt"):
        if import_host(name):
            sys.modules[name].GPTModel = build
    launch(script, arguments)


if __name__ == "__main__":
    main()
