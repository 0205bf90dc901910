"""One GRPO step on the keys of the rollout: the ratio of new to old log-probabilities is exactly 1.

    glm5-patch demo --steps 1 --output tiny-glm
    python examples/rl_replay.py tiny-glm

The rollout is a model of the same weights that selects keys in fp8, as sglang and vLLM serve GLM-5.
It returns its keys as sglang's ``indexer_topk``. The trainer replays them in the forward
that computes the old log-probabilities and in the training forward, under full recompute.
"""

from __future__ import annotations

import argparse
import base64

import torch
from torch import Tensor

from glm5_patch import (
    HFCheckpoint,
    TopkRecording,
    gpt_model,
    record_topk,
    replay_topk,
    single_process,
    topk_from_sglang,
    transformer_config,
)

PROMPT, RESPONSE, GROUP, CLIP = 24, 24, 4, 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(checkpoint: HFCheckpoint, **settings):
    """A model with the weights of the checkpoint."""
    config = transformer_config(
        checkpoint.config,
        transformer_impl="local",
        use_cpu_initialization=DEVICE == "cpu",
        moe_token_dispatcher_type="allgather",
        **settings,
    )
    model = gpt_model(checkpoint.config, config)
    checkpoint.load_into(model)
    return model


def log_probabilities(model, ids: Tensor) -> Tensor:
    """Of each token after the first, fp32 [group, tokens - 1]."""
    positions = torch.arange(ids.shape[1], device=DEVICE).expand_as(ids)
    logits = model(ids, positions, None)[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def roll_out(model) -> tuple[Tensor, Tensor, list[dict]]:
    """What a server returns: tokens [group, tokens], their log-probabilities, and ``meta_info``."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompt = torch.randint(model.vocab_size, (1, PROMPT), generator=generator, device=DEVICE)
    ids = prompt.repeat(GROUP, 1)
    for _ in range(RESPONSE):
        positions = torch.arange(ids.shape[1], device=DEVICE).expand_as(ids)
        last = model(ids, positions, None)[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(last, 1, generator=generator)], 1)
    with record_topk() as recorder:
        log_probs = log_probabilities(model, ids)
    return ids, log_probs, [as_sglang(one) for one in recorder.recordings]


def as_sglang(recording: TopkRecording) -> dict:
    """``meta_info`` with base64 of int32 [tokens - 1, layers, index_topk], of computing layers."""
    tokens, k = recording.length - 1, recording.index_topk
    places = torch.arange(k)
    every = torch.where(places <= torch.arange(tokens)[:, None], places, -1).int()
    keys = every[:, None].repeat(1, len(recording.layers), 1)
    for column, number in enumerate(sorted(recording.layers)):
        positions, selected = recording.keys(number)
        fed = positions < tokens
        keys[positions[fed], column] = selected[fed]
    text = base64.b64encode(keys.numpy().astype("<i4").tobytes()).decode()
    return {"indexer_topk": text, "indexer_topk_num_layers": len(recording.layers)}


def train(checkpoint: HFCheckpoint) -> dict[str, float]:
    """One step; what it found."""
    server = build(checkpoint, dsa_indexer_precision="fp8").eval()
    ids, served, meta_infos = roll_out(server)

    trainer = build(
        checkpoint,
        dsa_topk_replay=True,  # a forward without recordings is an error
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    ).train()
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    config, tokens = trainer.config, ids.shape[1]
    recordings = [topk_from_sglang(meta_info, tokens, config) for meta_info in meta_infos]
    response = slice(PROMPT - 1, None)
    reward = (ids[:, PROMPT:] % 2).float().mean(1)  # odd tokens are good
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-6))[:, None]

    with torch.no_grad(), replay_topk(recordings, report=True) as report:
        old = log_probabilities(trainer, ids)[:, response]
    with replay_topk(recordings):
        new = log_probabilities(trainer, ids)[:, response]
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    loss.backward()  # the recompute replays too
    optimizer.step()
    with torch.no_grad(), replay_topk(recordings):
        after = log_probabilities(trainer, ids)[:, response]

    own = build(checkpoint).eval()
    with torch.no_grad():
        selected = log_probabilities(own, ids)[:, response]
    served = served[:, response]
    return {
        "ratio, smallest": ratio.min().item(),
        "ratio, largest": ratio.max().item(),
        "ratio after the step, largest": (after - old).exp().max().item(),
        "keys that the trainer would have selected": min(report.shares.values()),
        "log-probabilities off the server's, replayed": (old - served).abs().max().item(),
        "log-probabilities off the server's, own keys": (selected - served).abs().max().item(),
        "bytes a token": sum(one.nbytes for one in recordings) / (GROUP * tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a small GLM-5, as of glm5-patch demo --output")
    directory = parser.parse_args().checkpoint
    with single_process(DEVICE):
        for name, value in train(HFCheckpoint(directory)).items():
            print(f"{name:50} {value:.6g}")


if __name__ == "__main__":
    main()
