"""A small GLM-5 on Python's own sources: indexers that learn from their layer, or from all they
serve.

    python benchmarks/served.py
    python benchmarks/served.py --cost 8192 32768    on a GPU: time and memory of the loss alone

A model with dense attention is trained on the bytes of the standard library. Two copies of it go
through a dense warm-up and a sparse training, with ``dsa_indexer_loss_layers`` "source" and
"served". Printed are the loss of the language model on held-out text, and the share of the
attention that the selected keys hold, of computing layers and of skip layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from glm5_patch import SelectionProbe, gpt_model, set_phase, single_process, transformer_config
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.ops.index_loss.operation import index_loss
from glm5_patch.ops.index_loss.reference import LossSettings
from glm5_patch.ops.index_loss.served import OverAllKeys, OverSelectedKeys
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention
from glm5_patch.tools.verify import forward

PATTERN = "FSSSFSSS"
INDEX_TOPK = 16
CONFIG = dict(
    model_type="glm_moe_dsa",
    vocab_size=256,
    hidden_size=96,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=len(PATTERN),
    first_k_dense_replace=len(PATTERN),
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=24,
    index_topk=INDEX_TOPK,
    index_head_dim=32,
    index_n_heads=4,
    index_topk_pattern=PATTERN,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


class Text:
    """Bytes of the standard library, the last tenth held out."""

    def __init__(self, length: int, batch: int):
        folder = Path(sysconfig.get_path("stdlib"))
        sources = sorted(folder.glob("*.py"))
        data = torch.tensor(list(b"".join(path.read_bytes() for path in sources)))
        self.length, self.batch = length, batch
        cut = len(data) * 9 // 10
        self.training, self.held_out = data[:cut], data[cut:]

    def draw(self, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """[batch, length + 1]."""
        starts = torch.randint(len(data) - self.length - 1, (self.batch,), generator=generator)
        return torch.stack([data[start : start + self.length + 1] for start in starts.tolist()])


def loss_of(model, ids):
    logits = forward(model, ids[:, :-1])
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def build(**settings):
    hf = HFConfig(CONFIG)
    config = transformer_config(
        hf,
        transformer_impl="local",
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
        **settings,
    )
    return gpt_model(hf, config)


def train(model, text: Text, steps: int, rate: float, seed: int) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        loss_of(model, text.draw(text.training, generator)).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()


@torch.no_grad()
def measure(model, text: Text, batches: int) -> dict[str, float]:
    """On held-out text, the same in each measurement."""
    generator = torch.Generator().manual_seed(12345)
    drawn = [text.draw(text.held_out, generator) for _ in range(batches)]
    losses = []
    probe = SelectionProbe(model, lambda: losses.extend(loss_of(model, ids) for ids in drawn))
    figures = probe.measure()
    found = {"loss": (sum(losses) / len(losses)).item()}
    for kind in ("attention_kept", "oracle_gap"):
        for letter, name in (("F", "computing"), ("S", "skip")):
            layers = [n for n, one in enumerate(PATTERN, 1) if one == letter]
            values = [figures[f"glm5/{kind}/layer_{n:02d}"] for n in layers]
            found[f"{kind}, {name} layers"] = sum(values) / len(values)
    return found


DIMS, HEADS, SCALE = MLADims(512, 192, 64, 256), 64, 256**-0.5
"""Of GLM-5.2."""
KEPT, USERS = 2048, 4
"""Selected keys, and layers that use one top-k."""
RUNS = 5


def inputs(length: int, device: str):
    """Of the attention of one layer, and of its indexer, in bf16."""

    def drawn(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    places = torch.arange(length, device=device)
    queries = QueryPositions(torch.zeros_like(places), longest=length)
    topk = (torch.rand(length, KEPT, device=device) * (places[:, None] + 1)).int()
    visible = torch.arange(KEPT, device=device, dtype=torch.int32)
    few = places[:, None] < KEPT
    topk = torch.where(few, torch.where(visible <= places[:, None], visible, -1), topk)[None]
    up_projection = drawn(DIMS.latent, HEADS * (DIMS.nope + DIMS.value)) * DIMS.latent**-0.5
    attention = AttentionInputs(
        drawn(length, 1, HEADS, DIMS.nope + DIMS.rope),
        drawn(length, 1, 1, DIMS.latent + DIMS.rope),
        up_projection,
        topk.contiguous(),
        queries,
        DIMS,
        SCALE,
    )
    weights = torch.rand(length, 1, 32, device=device)
    return attention, IndexerInputs(drawn(length, 1, 32, 128), drawn(length, 1, 128), weights)


def cost(length: int) -> None:
    """Milliseconds and GiB of the loss of one indexer, of its own layer and of four."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    selected, indexer = inputs(length, device)
    # Random keys repeat; a kernel reads as many.
    for sparse in (True, False):
        attention = selected if sparse else selected._replace(topk_indices=None)
        # As in training, where the attention of the layer has run.
        attention = attention._replace(lse=sparse_attention(attention)[1])
        settings = LossSettings(128**-0.5, 1.0 / length, sparse)
        kind = OverSelectedKeys if sparse else OverAllKeys

        def source(settings=settings, sparse=sparse, attention=attention):
            leaves = IndexerInputs(*(tensor.detach().requires_grad_() for tensor in indexer))
            options = dict(index_scale=128**-0.5, coefficient=1.0, sparse=sparse, per_token=False)
            index_loss(leaves, attention, **options).backward()

        def served(settings=settings, kind=kind, attention=attention):
            found = kind(USERS)
            found.begin(indexer, settings)
            for user in range(USERS):
                found.add(user, attention, None)
            found.take(indexer, settings)

        figures = []
        for run in (source, served):
            run()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            times = []
            for _ in range(RUNS):
                start = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - start))
            took = statistics.median(times)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else 0.0
            figures.append(f"{run.__name__} {took:.1f} ms, {peak:.2f} GiB")
        over = "selected keys" if sparse else "all keys"
        print(f"{length} tokens, loss over {over}: {'; '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dense", type=int, default=300, help="steps of the dense model")
    parser.add_argument("--warmup", type=int, default=200, help="steps of the dense warm-up")
    parser.add_argument("--sparse", type=int, default=200, help="steps of sparse training")
    parser.add_argument("--length", type=int, default=192, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cost", type=int, nargs="+", metavar="TOKENS", help="time the loss alone")
    options = parser.parse_args()
    if options.cost:
        for length in options.cost:
            cost(length)
        return
    text, rows = Text(options.length, options.batch), []

    def note(seed, layers, after, model):
        found = measure(model, text, 8)
        rows.append({"seed": seed, "indexers learn from": layers, "after": after, **found})
        if not options.json:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"{time.perf_counter() - start:4.0f} s, {layers}, {after}: {shown}", flush=True)

    start = time.perf_counter()
    for seed in range(options.seeds):
        with single_process("cpu", seed):
            dense = build(dsa_indexer_topk=options.length)
            train(dense, text, options.dense, 2e-3, seed)
            note(seed, "-", "dense training", dense)
            for layers in ("source", "served"):
                # A coefficient of 1: Adam does not care, and the trunk gets no gradient of it.
                model = build(dsa_indexer_loss_coeff=1.0, dsa_indexer_loss_layers=layers)
                model.load_state_dict(dense.state_dict())
                set_phase(model, "dense_warmup")
                train(model, text, options.warmup, 2e-3, seed + 100)
                set_phase(model, "joint")
                note(seed, layers, "dense warm-up", model)
                model.config.dsa_indexer_use_sparse_loss = True
                train(model, text, options.sparse, 5e-4, seed + 200)
                note(seed, layers, "sparse training", model)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
