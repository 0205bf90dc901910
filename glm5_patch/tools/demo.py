"""The main job, end to end, on a model small enough for a laptop.

A random GLM-5 is made and saved by transformers; Megatron builds it through the public spec
function, loads it, is compared with transformers, trains under full recompute with two
microbatches in flight, and writes a checkpoint that transformers reads again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import glm5_patch

from ..checkpoint.reader import HFCheckpoint
from ..checkpoint.writer import save
from ..config.huggingface import HFConfig
from ..errors import CheckpointError, GLM5PatchError
from ..patches.announce import sparse_attention_by
from ..testing.cpu_host import single_process
from .report import print_table, progress

LOGITS_BOUND = 2e-5
"""fp32 logits against transformers, largest absolute difference over the largest logit."""
KEPT_BOUND = 0.99
"""bf16: the share of Hugging Face's keys that each layer selects from Hugging Face's input."""
ROUNDING_BOUND = 1.5
"""bf16: distance of the logits from those in fp32, over the distance of Hugging Face's own."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRADIENT_BOUND = 1e-6
"""Gradients under recompute against those without, relative L2 norm."""


@dataclass
class Check:
    name: str
    measured: str
    wanted: str
    passed: bool


@dataclass
class Report:
    """Everything that the demo found; what ``--json`` prints."""

    version: str
    model: str
    checkpoint: str = ""
    kernels: str = ""
    """What computed the sparse attention."""
    losses: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    output: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def check(self, name: str, measured: str, wanted: str, passed: bool) -> None:
        self.checks.append(Check(name, measured, wanted, bool(passed)))


def run(options: argparse.Namespace) -> int:
    """Run the demo; 0 if every check passed, 1 otherwise.

    Raises:
        GLM5PatchError: an option or the checkpoint is unusable; nothing was written.
    """
    started = time.perf_counter()
    _validate(options)
    warnings.filterwarnings("ignore", category=UserWarning)  # the hosts' notes on absent packages
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    if options.device == "cpu" and not options.checkpoint:
        torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
    glm5_patch.require()
    with tempfile.TemporaryDirectory(prefix="glm5-patch-demo-") as scratch:
        source = Path(options.checkpoint or _random_checkpoint(options, Path(scratch) / "random"))
        checkpoint = HFCheckpoint(source)
        hf = checkpoint.config
        report = Report(
            version=glm5_patch.__version__,
            model=f"{hf.num_hidden_layers} layers, {hf.schedule}, index_topk {hf.index_topk}",
            checkpoint=str(checkpoint.report),
            kernels=sparse_attention_by(DTYPES[options.dtype]),
        )
        _say(f"checkpoint: {report.checkpoint}")
        output = Path(options.output) if options.output else Path(scratch) / "trained"
        with single_process(options.device, options.seed):
            _main_job(options, checkpoint, output, report)
        report.output = options.output
    report.seconds = round(time.perf_counter() - started, 1)
    _print(report, options.json)
    return 0 if report.passed else 1


def _validate(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise GLM5PatchError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if options.device == "cpu" and torch.cuda.is_available():
        raise GLM5PatchError(
            "--device cpu: megatron-core takes the CUDA device that is here; use --device cuda, "
            "or hide it with CUDA_VISIBLE_DEVICES="
        )
    if options.impl == "transformer_engine" and options.device == "cpu":
        raise GLM5PatchError("--impl transformer_engine needs --device cuda")
    if options.output and Path(options.output).exists() and any(Path(options.output).iterdir()):
        raise CheckpointError(f"--output {options.output}: exists and is not empty")


def _random_checkpoint(options: argparse.Namespace, directory: Path) -> Path:
    """Make a GLM-5 with random weights and save it as transformers does."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    sharing = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    config = GlmMoeDsaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_topk=32,
        index_head_dim=32,
        index_n_heads=8,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 8e6 if options.flavour == "5.2" else 1e6,
        },
        pad_token_id=None,
        **(sharing if options.flavour == "5.2" else {}),
    )
    model = GlmMoeDsaForCausalLM(config).float()
    randomize(model)
    model.save_pretrained(directory)
    return directory


def randomize(model: torch.nn.Module) -> None:
    """Random weights under which a wrong norm, bias or selection shows in the logits."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name or name.endswith("k_norm.bias"):
                tensor.normal_(std=0.1)
            elif "norm" in name:
                tensor.normal_(mean=1.0, std=0.3)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)


def _main_job(options, checkpoint: HFCheckpoint, output: Path, report: Report) -> None:
    from ..attention.build import (
        HF_LATENT_NORM_EPSILON,
        gpt_model,
        set_latent_norm_epsilon,
        transformer_config,
    )

    hf = checkpoint.config
    te = options.impl == "transformer_engine"
    config = transformer_config(
        hf,
        transformer_impl=options.impl,
        params_dtype=DTYPES[options.dtype],
        bf16=options.dtype == "bf16",
        use_cpu_initialization=options.device == "cpu",
        perform_initialization=False,
        moe_token_dispatcher_type="alltoall" if options.device == "cuda" else "allgather",
        moe_grouped_gemm=te,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    model = gpt_model(hf, config)
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)  # the one thing Hugging Face has alone
    checkpoint.load_into(model)
    _say(f"megatron: built and loaded, {options.impl} modules on {options.device}")

    length, batch = _sizes(hf, options.seq_length)
    ids = torch.randint(hf.vocab_size, (2, batch, length + 1), device=options.device)
    report.check(
        "sequence exceeds index_topk", f"{length}", f"> {hf.index_topk}", length > hf.index_topk
    )
    _compare(checkpoint.directory, model, ids[0, :, :-1], report, "loaded")
    _check_recompute(model, ids, report)
    if not options.steps:  # verify
        return
    _train(model, ids, options.steps, report)
    save(model, hf, output, checkpoint)
    _say("transformers: reading the trained checkpoint back")
    _compare(output, model, ids[1, :, :-1], report, "trained")


def _sizes(hf: HFConfig, seq_length: int | None) -> tuple[int, int]:
    """Sequence length well above ``index_topk``, and as many sequences as a laptop bears."""
    if seq_length is None:
        wanted = 6 * hf.index_topk if hf.index_topk <= 256 else 2 * hf.index_topk
        seq_length = min(wanted, hf.max_position_embeddings)
    return seq_length, 4 if seq_length <= 1536 else 1


def forward(model, ids):
    """Logits [b, s, vocab] of a whole sequence."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return model(ids, positions, None)


def _compare(directory: Path, model, ids, report: Report, label: str) -> None:
    """The model against transformers on the same checkpoint and in the same dtype."""
    from transformers import GlmMoeDsaForCausalLM

    dtype = model.config.params_dtype
    reference = GlmMoeDsaForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).to(ids.device)
    model.eval()
    compare = _compare_exactly if dtype == torch.float32 else _compare_rounded
    with torch.no_grad():
        compare(reference, model, ids, report, label)


def _compare_exactly(reference, model, ids, report: Report, label: str) -> None:
    """Top-k of every layer in a whole forward, and logits."""
    from ..testing.parity import compare_topk, recorded, recorded_hf

    with recorded(model) as ours, recorded_hf(reference) as theirs:
        logits, expected = forward(model, ids), reference(ids, use_cache=False).logits
    topk = compare_topk(ours, theirs)
    ties = f", {topk.near_ties} near ties" if topk.near_ties else ""
    report.check(
        f"{label}: top-k of {len(theirs)} layers equals Hugging Face's",
        f"{topk.differing} of {topk.rows} rows differ{ties}",
        "0",
        topk.differing == 0 and topk.intact.float().mean() >= 0.5,
    )
    difference = (logits - expected)[topk.intact.to(logits.device)].abs().max()
    error = (difference / expected.abs().max()).item()
    report.check(
        f"{label}: logits", f"{error:.1e} relative", f"<= {LOGITS_BOUND:.0e}", error <= LOGITS_BOUND
    )


def _compare_rounded(reference, model, ids, report: Report, label: str) -> None:
    """Below fp32 a flipped key changes all that follows. So each layer is compared on one input,
    and the logits with those of the same weights in fp32."""
    from ..testing.parity import same_input_shares

    shares = same_input_shares(model, reference, ids)
    worst = min(shares.values())
    report.check(
        f"{label}: keys of each layer that are Hugging Face's, from its input",
        f"{100 * worst:.2f} % in the worst of {len(shares)} layers",
        f">= {KEPT_BOUND:.0%}",
        worst >= KEPT_BOUND,
    )
    logits, theirs = forward(model, ids).float(), reference(ids, use_cache=False).logits.float()
    exact = reference.float()(ids, use_cache=False).logits
    ratio = ((logits - exact).norm() / (theirs - exact).norm()).item()
    report.check(
        f"{label}: logits' distance from fp32",
        f"{ratio:.2f} times Hugging Face's own",
        f"<= {ROUNDING_BOUND}",
        ratio <= ROUNDING_BOUND,
    )


def _losses(model, ids) -> list[torch.Tensor]:
    """Forward both microbatches before either backward, as a pipeline does."""
    return [
        cross_entropy(forward(model, batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        for batch in ids
    ]


def _gradients(model, ids) -> torch.Tensor:
    model.zero_grad()
    for loss in _losses(model, ids):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _check_recompute(model, ids, report: Report) -> None:
    model.train()
    # On a GPU a key's gradient is else added up in the order in which its queries are done.
    torch.use_deterministic_algorithms(True, warn_only=True)
    recomputed = _gradients(model, ids)
    granularity, model.config.recompute_granularity = model.config.recompute_granularity, None
    plain = _gradients(model, ids)
    model.config.recompute_granularity = granularity
    torch.use_deterministic_algorithms(False)
    error = ((recomputed - plain).norm() / plain.norm()).item()
    report.check(
        "full recompute, two microbatches in flight: gradients",
        f"{error:.1e} relative",
        f"<= {GRADIENT_BOUND:.0e}",
        error <= GRADIENT_BOUND,
    )


def _train(model, ids, steps: int, report: Report) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with progress("training", steps, every=5) as advance:
        for _ in range(steps):
            optimizer.zero_grad()
            losses = _losses(model, ids)
            for loss in losses:
                (loss / len(losses)).backward()
            optimizer.step()
            report.losses.append(sum(loss.item() for loss in losses) / len(losses))
            advance(f"loss {report.losses[-1]:.3f}")
    first, last = report.losses[0], report.losses[-1]
    report.check(
        f"{steps} training steps: the loss falls",
        f"{first:.3f} -> {last:.3f}",
        "lower",
        last < first or steps == 1,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(report), "passed": report.passed}, indent=2))
        return
    print(f"glm5-patch {report.version}: {report.model}")
    print_table(
        ("check", "measured", "wanted", ""),
        [
            (check.name, check.measured, check.wanted, "ok" if check.passed else "FAILED")
            for check in report.checks
        ],
    )
    print(f"sparse attention: {report.kernels}")
    print(f"{'passed' if report.passed else 'FAILED'} in {report.seconds} s")
    if report.output:
        print(f"the trained checkpoint is in {report.output}")
