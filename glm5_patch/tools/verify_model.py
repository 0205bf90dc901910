"""``glm5-patch verify --model MODULE:FUNCTION``: what is wrong with anybody's GLM-5."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import glm5_patch

from ..errors import GLM5PatchError
from ..testing.oracle import Oracle
from ..testing.oracle.candidate import Candidate
from ..testing.oracle.checkpoint import LENGTH
from ..testing.oracle.explain import BOUND
from ..testing.oracle.faults import known
from .report import Result, print_table, print_text, say


@dataclass
class ModelReport:
    """What the command found; ``--json`` prints it."""

    version: str
    model: str
    oracle: str
    """What the reference was compared with."""
    tokens: str
    within: float | None
    """The largest relative difference while all keys are selected; None if it is not finite."""
    beyond: float | None
    """That beyond index_topk."""
    passed: bool
    allowed: list[str]
    explanations: list[list[str]]
    """Sets of known faults, each of which gives the model's logits; [[]] if they are right."""
    setting: dict[str, float | tuple[int, ...]]
    """A setting with another value than in any known fault, which comes with each explanation."""
    says: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def result(self) -> Result:
        return Result(int(not self.passed), asdict(self), self._show)

    def _show(self) -> None:
        print_text(f"glm5-patch {self.version}: {self.model}")
        print_text(f"oracle: {self.oracle}")
        print_text(f"tokens: {self.tokens}")
        rows = {"while all keys are selected": self.within, "beyond index_topk": self.beyond}
        print_table(
            ("logits", "largest difference", "wanted", ""),
            [(what, *self._cells(error)) for what, error in rows.items()],
        )
        for line in self.says:
            print_text(line)
        if self.passed and self.explanations != [[]]:
            print_text(f"allowed: {', '.join(self.allowed)}")
        print(f"{'passed' if self.passed else 'FAILED'} in {self.seconds} s")

    def _cells(self, error: float | None) -> tuple[str, str, str]:
        measured = "not finite" if error is None else f"{error:.1e} relative"
        equal = error is not None and error <= BOUND
        return (
            measured,
            f"<= {BOUND:.0e}",
            "ok" if equal else "allowed" if self.passed else "FAILED",
        )


def run(options: argparse.Namespace) -> Result:
    """Build the model that ``options.model`` names, and judge it.

    Raises:
        GLM5PatchError: an option is unusable, or the model can't be built or called.
    """
    started = time.perf_counter()
    _validate(options)
    allowed = known(options.allow)
    warnings.filterwarnings("ignore", category=UserWarning)  # notes on absent packages
    if options.device == "cpu":
        torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
    say(f"importing {options.model}")
    candidate = Candidate.named(options.model, options.device)
    with tempfile.TemporaryDirectory(prefix="glm5-patch-") as scratch:
        length = options.seq_length or LENGTH
        oracle = Oracle(Path(scratch), options.flavour, options.seed, length)
        say("comparing the oracle with transformers")
        compared = _compare_hugging_face(oracle)
        say(f"building the model from {oracle.checkpoint}, and comparing its logits")
        verdict = oracle.judge_built(candidate)
    batch, length = oracle.ids.shape
    sharing = "shared" in oracle.config.indexer_types
    report = ModelReport(
        version=glm5_patch.__version__,
        model=options.model,
        oracle=compared,
        tokens=f"{batch} sequences of {length}, index_topk {oracle.config.index_topk}, "
        f"{oracle.config.num_hidden_layers} layers, {'some' if sharing else 'none'} of which share",
        within=_finite(verdict.within),
        beyond=_finite(verdict.beyond),
        passed=verdict.passed(allowed),
        allowed=list(allowed),
        explanations=[[fault.id for fault in one] for one in verdict.explanations],
        setting={} if verdict.fit is None else {verdict.fit.setting: verdict.fit.value},
        says=verdict.lines(),
        seconds=round(time.perf_counter() - started, 1),
    )
    return report.result()


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None


def _compare_hugging_face(oracle: Oracle) -> str:
    """What the reference was compared with, in words."""
    ours = "the reference of glm5_patch.testing.oracle"
    try:
        import transformers
    except ImportError:
        return f"{ours}; transformers is not installed, so it was not compared"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = f"GlmMoeDsaForCausalLM of transformers {transformers.__version__}"
    try:
        error = oracle.compare_hugging_face()
    except (GLM5PatchError, ImportError) as failed:
        return f"{ours}; {theirs} can't be compared: {failed}"
    if error > BOUND:
        return f"{ours}; {theirs} computes another model ({error:.1e}): 5.13 and later are right"
    return f"{theirs}; the reference differs by {error:.1e}"


def _validate(options: argparse.Namespace) -> None:
    if options.checkpoint:
        raise GLM5PatchError(
            f"--checkpoint {options.checkpoint}: --model {options.model} gets a checkpoint on "
            "which each known fault shows; leave --checkpoint out"
        )
    if options.dtype != "fp32":
        raise GLM5PatchError(
            f"--dtype {options.dtype}: --model {options.model} is compared in fp32; leave it out"
        )
    if options.impl != "local":
        raise GLM5PatchError(
            f"--impl {options.impl}: the function of --model {options.model} chooses the modules; "
            "leave --impl out"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise GLM5PatchError("--device cuda: this torch sees no CUDA device; use --device cpu")
