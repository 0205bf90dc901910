"""Bytes of recorded keys of a small model, before and after its selections settle. On a CPU.

    python benchmarks/rl/recordings.py [--steps 150]

Random selections hardly compress. So a GLM-5 of 4 layers learns text whose tokens depend on far
earlier ones, with the indexer's loss, and every few steps the selections of new text are recorded:
sequences of 1024 tokens, 64 keys a query. It prints the compressed size of the queries that have a
choice, and how many keys a query shares with the one before it. Marks take a share of the keys in
int32 that depends on their density (here 1 in 16 at the end of a sequence, as 2048 in 32,768), and
not on their number. The table takes about the same bytes a query for any number of keys. Both
together are what a query of GLM-5.2 takes that selects as alike.
"""

from __future__ import annotations

import argparse

import torch

from glm5_patch import gpt_model, record_topk, single_process, transformer_config
from glm5_patch.config.huggingface import HFConfig

LENGTH, TOPK, VOCABULARY, BATCH = 1024, 64, 64, 1


def model():
    """Small, and of GLM-5's architecture."""
    hf = HFConfig(
        dict(
            model_type="glm_moe_dsa",
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_shared_experts=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            routed_scaling_factor=1.0,
            first_k_dense_replace=1,
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_nope_head_dim=24,
            qk_rope_head_dim=16,
            v_head_dim=32,
            index_topk=TOPK,
            index_head_dim=32,
            index_n_heads=4,
            indexer_types=["full"] * 3 + ["shared"],
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            hidden_act="silu",
            attention_bias=False,
            tie_word_embeddings=False,
        )
    )
    config = transformer_config(
        hf,
        transformer_impl="local",
        use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
        dsa_indexer_loss_coeff=1.0,
        dsa_indexer_use_sparse_loss=False,
    )
    return gpt_model(hf, config)


def text(seed: int) -> torch.Tensor:
    """Phrases of 16 tokens, most of them said before: [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    phrases = torch.randint(VOCABULARY, (BATCH, 12, 16), generator=generator)
    order = torch.randint(12, (BATCH, LENGTH // 16), generator=generator)
    return torch.stack([of[at].flatten() for of, at in zip(phrases, order)])


def measure(trained, step: int, loss: float) -> None:
    ids = text(10**6)
    with torch.no_grad(), record_topk() as recorder:
        trained(ids, torch.arange(LENGTH).expand_as(ids), None)
    (recording,) = recorder.recordings
    queries = LENGTH - TOPK
    sizes = []
    for number, frames in recording.layers.items():
        keys = recording.keys(number)[1]
        shared = torch.isin(keys[1:] + torch.arange(len(keys) - 1)[:, None] * LENGTH,
                            keys[:-1] + torch.arange(len(keys) - 1)[:, None] * LENGTH)  # fmt: skip
        unpacked = [frame.unpack() for frame in frames]
        marks = sum(len(one.unary) + len(one.low) for one in unpacked) / (4 * TOPK * queries)
        table = sum(len(frame.data) for frame in frames) / queries - 4 * TOPK * marks
        sizes.append(4 * 2048 * marks + table)
        print(
            f"step {step:4}, loss {loss:.2f}, layer {number}: marks {100 * marks:.2f} % of int32, "
            f"table {table:.1f} bytes a query; with 2048 keys {sizes[-1]:.0f} bytes; "
            f"{100 * shared.float().mean():.0f} % of the keys are the neighbour's",
            flush=True,
        )
    mean = sum(sizes) / len(sizes)
    print(f"step {step:4}: {21 * mean / 1024:.1f} KiB a token of 21 layers", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    with single_process("cpu"):
        trained = model().train()
        optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
        loss = torch.tensor(float("nan"))
        for step in range(steps + 1):
            if step % 50 == 0:
                measure(trained, step, loss.item())
            ids = text(step)
            output = trained(ids, torch.arange(LENGTH).expand_as(ids), None, labels=ids.roll(-1, 1))
            loss = output[:, :-1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
