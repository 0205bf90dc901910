"""``glm5-patch verify``: compare a small GLM-5 with Hugging Face on this installation.

transformers makes and saves a random GLM-5. Megatron builds it through its public spec function, as
a ``GPTModel`` or a ``HybridModel``, and loads it. The keys that each layer selects, the logits and
the gradients are compared with those of transformers, and the gradients under full recompute, with
two microbatches in flight, with those without recompute.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import glm5_patch

from ..checkpoint.reader import HFCheckpoint
from ..config.huggingface import HFConfig
from ..errors import GLM5PatchError
from ..patches.announce import sparse_attention_by
from ..testing.cpu_host import single_process
from .report import Result, print_table, print_text, progress, say

LOGITS_BOUND = 2e-5
"""fp32 logits against transformers, largest absolute difference over the largest logit."""
KEPT_BOUND = 0.99
"""bf16: the share of Hugging Face's keys that each layer selects from Hugging Face's input."""
ROUNDING_BOUND = 1.5
"""bf16: distance of the logits from those in fp32, over the distance of Hugging Face's own."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRADIENT_BOUND = 1e-5
"""fp32 gradients of each parameter against transformers', relative L2 norm."""
RECOMPUTE_BOUND = 1e-6
"""Gradients under recompute against those without, relative L2 norm."""


@dataclass
class Check:
    """One comparison, in words."""

    name: str
    measured: str
    wanted: str
    passed: bool


@dataclass
class Report:
    """What ``verify`` or ``demo`` found; ``--json`` prints it."""

    version: str
    model: str
    checkpoint: str = ""
    kernels: str = ""
    """The backend of sparse attention."""
    losses: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    output: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def check(self, name: str, measured: str, wanted: str, passed: bool) -> None:
        self.checks.append(Check(name, measured, wanted, bool(passed)))

    def result(self) -> Result:
        return Result(int(not self.passed), {**asdict(self), "passed": self.passed}, self._show)

    def _show(self) -> None:
        print_text(f"glm5-patch {self.version}: {self.model}")
        print_table(
            ("check", "measured", "wanted", ""),
            [
                (check.name, check.measured, check.wanted, "ok" if check.passed else "FAILED")
                for check in self.checks
            ],
        )
        print_text(f"sparse attention: {self.kernels}")
        print(f"{'passed' if self.passed else 'FAILED'} in {self.seconds} s")
        if self.output:
            print(f"the trained checkpoint is in {self.output}")


@dataclass
class Session:
    """A model that was built and loaded, and what is found about it."""

    checkpoint: HFCheckpoint
    model: torch.nn.Module
    ids: torch.Tensor
    """int64 [2 microbatches, b, s + 1]."""
    report: Report
    scratch: Path
    """A directory that goes away at the end."""


def run(options: argparse.Namespace) -> Result:
    """Compare.

    Raises:
        GLM5PatchError: an option or the checkpoint is unusable.
    """
    with session(options) as opened:
        check_loaded(opened)
    return opened.report.result()


@contextmanager
def session(options: argparse.Namespace) -> Iterator[Session]:
    """Build and load the model that the options describe, in a world of one process."""
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
    with tempfile.TemporaryDirectory(prefix="glm5-patch-") as scratch:
        if not options.checkpoint:
            say("transformers: making a random GLM-5")
        source = Path(options.checkpoint or _random_checkpoint(options, Path(scratch) / "random"))
        checkpoint = HFCheckpoint(source)
        hf = checkpoint.config
        report = Report(
            version=glm5_patch.__version__,
            model=f"{hf.num_hidden_layers} layers, {hf.schedule}, index_topk {hf.index_topk}",
            checkpoint=str(checkpoint.report),
            kernels=sparse_attention_by(DTYPES[options.dtype]),
        )
        say(f"checkpoint: {report.checkpoint}")
        with single_process(options.device, options.seed):
            model = _model(options, checkpoint)
            name = type(model).__name__
            say(f"megatron: {name} built and loaded, {options.impl} modules on {options.device}")
            length, batch = _sizes(hf, options.seq_length)
            ids = torch.randint(hf.vocab_size, (2, batch, length + 1), device=options.device)
            yield Session(checkpoint, model, ids, report, Path(scratch))
    report.seconds = round(time.perf_counter() - started, 1)


def _validate(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise GLM5PatchError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if options.device == "cpu" and torch.cuda.is_available():
        raise GLM5PatchError(
            "--device cpu: megatron-core uses the CUDA device of this machine; use --device cuda, "
            "or hide it with CUDA_VISIBLE_DEVICES="
        )
    if options.impl == "transformer_engine" and options.device == "cpu":
        raise GLM5PatchError("--impl transformer_engine needs --device cuda")


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


def to_load_into(device: str, dtype: str, impl: str = "local") -> dict[str, Any]:
    """Settings of a model of one process that a checkpoint fills."""
    return dict(
        transformer_impl=impl,
        params_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        use_cpu_initialization=device == "cpu",
        perform_initialization=False,
        moe_token_dispatcher_type="alltoall" if device == "cuda" else "allgather",
    )


def _model(options: argparse.Namespace, checkpoint: HFCheckpoint) -> torch.nn.Module:
    from ..attention import build
    from ..attention.hybrid import hybrid_model

    hybrid = options.model == "hybrid"
    config = build.transformer_config(
        checkpoint.config,
        hybrid=hybrid,
        **to_load_into(options.device, options.dtype, options.impl),
        moe_grouped_gemm=options.impl == "transformer_engine",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    model = (hybrid_model if hybrid else build.gpt_model)(checkpoint.config, config)
    build.set_latent_norm_epsilon(model, build.HF_LATENT_NORM_EPSILON)  # Hugging Face's alone
    with progress("loading", len(set(checkpoint.files.values()))) as advance:
        checkpoint.load_into(model, advance)
    glm5_patch.set_phase(model, "frozen_indexer")  # no loss trains them here
    return model


def check_loaded(opened: Session) -> None:
    """Keys, logits and recompute of the model as it was loaded."""
    length, topk = opened.ids.shape[2] - 1, opened.checkpoint.config.index_topk
    opened.report.check("sequence exceeds index_topk", f"{length}", f"> {topk}", length > topk)
    say("comparing keys and logits with transformers")
    compare(opened, opened.checkpoint.directory, microbatch=0, label="loaded")
    say("comparing gradients with and without recompute")
    _check_recompute(opened.model, opened.ids, opened.report)


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


def compare(opened: Session, directory: Path, microbatch: int, label: str) -> None:
    """The model against transformers on the checkpoint in ``directory``, in the same dtype."""
    from transformers import GlmMoeDsaForCausalLM

    model, ids = opened.model, opened.ids[microbatch, :, :-1]
    dtype = model.config.params_dtype
    reference = GlmMoeDsaForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).to(ids.device)
    model.eval()
    if dtype == torch.float32:
        intact = _compare_exactly(reference, model, ids, opened.report, label)
        _compare_gradients(reference, model, ids, intact, opened.report, label)
    else:
        _compare_rounded(reference, model, ids, opened.report, label)


@torch.no_grad()
def _compare_exactly(reference, model, ids, report: Report, label: str) -> torch.Tensor:
    """Top-k of every layer in a whole forward, and logits.

    Returns:
        The tokens that no near tie has touched, bool [b, s].
    """
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
    return topk.intact.to(ids.device)


def _compare_gradients(reference, model, ids, intact, report: Report, label: str) -> None:
    """Of the loss of the tokens before the first near tie of each sequence."""
    from ..testing.parity import LowerTies, gradient_errors

    model.zero_grad()
    with LowerTies():
        theirs = reference(ids, use_cache=False).logits
    for logits in (forward(model, ids), theirs):
        cross_entropy(logits[:, :-1][intact[:, 1:]], ids[:, 1:][intact[:, 1:]]).backward()
    errors = gradient_errors(model, reference)
    worst = max(errors, key=errors.__getitem__)
    report.check(
        f"{label}: gradients of {len(errors)} parameters",
        f"{errors[worst]:.1e} relative in {worst}",
        f"<= {GRADIENT_BOUND:.0e}",
        errors[worst] <= GRADIENT_BOUND,
    )


@torch.no_grad()
def _compare_rounded(reference, model, ids, report: Report, label: str) -> None:
    """Below fp32 a flipped key changes all that follows. So each layer is compared on one input,
    and the logits with those of the same weights in fp32."""
    from ..testing.parity import LowerTies, same_input_shares

    shares = same_input_shares(model, reference, ids)
    worst = min(shares.values())
    report.check(
        f"{label}: keys of each layer that are Hugging Face's, from its input",
        f"{100 * worst:.2f} % in the worst of {len(shares)} layers",
        f">= {KEPT_BOUND:.0%}",
        worst >= KEPT_BOUND,
    )
    with LowerTies():
        theirs = reference(ids, use_cache=False).logits.float()
        exact = reference.float()(ids, use_cache=False).logits
    logits = forward(model, ids).float()
    ratio = ((logits - exact).norm() / (theirs - exact).norm()).item()
    report.check(
        f"{label}: logits' distance from fp32",
        f"{ratio:.2f} times Hugging Face's own",
        f"<= {ROUNDING_BOUND}",
        ratio <= ROUNDING_BOUND,
    )


def losses(model, ids) -> list[torch.Tensor]:
    """Forward both microbatches before either backward, as a pipeline does."""
    return [
        cross_entropy(forward(model, batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        for batch in ids
    ]


def _gradients(model, ids) -> torch.Tensor:
    model.zero_grad()
    for loss in losses(model, ids):
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
        f"<= {RECOMPUTE_BOUND:.0e}",
        error <= RECOMPUTE_BOUND,
    )
