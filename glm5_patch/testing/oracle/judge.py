"""Compare a model with the reference, and say in words what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import GLM5PatchError
from . import checkpoint
from .candidate import Candidate, logits_of, recorded_layers
from .explain import BOUND, MOST, Explainer, Faults, Fit, token_errors
from .faults import Fault, known
from .reference import Conventions, Reference

BATCH = 6
HIDDEN_BOUND = 1e-4
"""The largest difference of two equal outputs of a layer, relative to its largest value."""
ROUNDING = 1e-3
"""A difference below this, at all tokens, looks like arithmetic of lower precision."""


@dataclass
class Verdict:
    """What is found about one model."""

    within: float
    """The largest relative difference of the logits of the first ``index_topk`` tokens."""
    beyond: float
    """That of later tokens."""
    explanations: list[Faults]
    """Sets of known faults, each of which gives the model's logits; [()] if they are right."""
    fit: Fit | None = None
    """A setting with another value than in any known fault, which comes with each explanation."""
    remarks: list[str] = field(default_factory=list)
    """Where nothing explains the difference: what can be said of it."""

    @property
    def right(self) -> bool:
        return self.explanations == [()] and self.fit is None

    def passed(self, allow: Collection[str] = ()) -> bool:
        """Whether the logits are right, or right but for faults that are allowed."""
        known_only = self.fit is None
        return known_only and any({f.id for f in one} <= set(allow) for one in self.explanations)

    @property
    def faults(self) -> list[Fault]:
        """Each fault of an explanation, once."""
        return list({fault.id: fault for one in self.explanations for fault in one}.values())

    def lines(self) -> list[str]:
        """In words, one paragraph a line."""
        if self.right:
            return ["The logits are Hugging Face's."]
        if not self.explanations:
            return ["No known fault explains the difference.", *self.remarks]
        with_fit = [] if self.fit is None else [str(self.fit)]
        said = (" and ".join([*with_fit, *(f.id for f in one)]) for one in self.explanations)
        return [
            f"The model computes a GLM-5 with {'; or '.join(said)}.",
            *(f"{fault.id}: {fault.means} Look at: {fault.look_at}." for fault in self.faults),
        ]


@dataclass
class Seen:
    """What a model did."""

    logits: Tensor
    """[b, s, vocab]."""
    hidden: list[Tensor]
    """The output of each layer, [b, s, h], where it can be had."""
    leaks: bool
    """Whether the logits of a token depend on later tokens."""


class Oracle:
    """A random GLM-5 on disk, and a judge of models that were loaded from it.

    Args:
        directory: where checkpoints are written.
        flavour: "5.2", or "5.1", in which every layer computes its top-k.
        seed: of weights and tokens.
        length: of a sequence, in tokens.

    Raises:
        GLM5PatchError: the length does not exceed ``index_topk``, or is too large; or the weights
            of this seed leave choices to rounding.
    """

    def __init__(
        self,
        directory: Path,
        flavour: str = "5.2",
        seed: int = 0,
        length: int = checkpoint.LENGTH,
    ):
        self.config = checkpoint.make_config(flavour)
        lowest, highest = self.config.index_topk + 1, self.config.vocab_size
        if not lowest <= length <= highest:
            raise GLM5PatchError(
                f"a sequence of {length} tokens: it must have {lowest} to {highest}, more than "
                "index_topk and at most one of each token"
            )
        self._directory = Path(directory)
        self._seed = seed
        weights = checkpoint.make_weights(self.config, seed, all_indexers=True)
        reference = Reference(self.config, weights)
        self.ids = self._tokens(reference, length)
        """int64 [b, s]."""
        self.explainer = Explainer(reference, self.ids)
        self.checkpoint = self._saved("glm5", all_indexers=False)
        """The directory to load a model from."""

    def _saved(self, name: str, all_indexers: bool) -> Path:
        directory = self._directory / name
        weights = checkpoint.make_weights(self.config, self._seed, all_indexers)
        checkpoint.save(directory, self.config, weights)
        return directory

    def _tokens(self, reference: Reference, length: int) -> Tensor:
        """Sequences in which no near tie leaves a choice to rounding."""
        found = torch.empty(0, length, dtype=torch.long)
        for seed in range(self._seed, self._seed + 100):
            ids = checkpoint.make_tokens(self.config, seed, 2 * BATCH, length)
            clear = reference(ids, Conventions.of(self.config)).intact.all(-1)
            found = torch.cat([found, ids[clear]])[:BATCH]
            if len(found) == BATCH:
                return found
        raise GLM5PatchError(f"seed {self._seed}: every sequence has a near tie; use another seed")

    def compare_hugging_face(self) -> float:
        """The largest relative difference of this transformers' ``GlmMoeDsaForCausalLM``.

        Raises:
            GLM5PatchError: it can't load or run the checkpoint.
        """
        from transformers import GlmMoeDsaForCausalLM

        try:
            model = GlmMoeDsaForCausalLM.from_pretrained(
                self.checkpoint, dtype=torch.float32, attn_implementation="eager"
            )
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise GLM5PatchError(f"{type(error).__name__}: {said}") from error
        logits = logits_of(model, self.ids, self.config.vocab_size, "Hugging Face's model")
        right = self.explainer.forward(self.explainer.right)
        return token_errors(right.logits, logits).max().item()

    def judge(self, model: Any, name: str = "the model", device: str = "cpu") -> Verdict:
        """Compare one model.

        Args:
            model: see ``candidate.logits_of``; it has the weights of ``checkpoint``.
            name: of it, in messages.
            device: of the ids that the model gets.

        Raises:
            GLM5PatchError: the model can't be called, or returns no logits.
        """
        return self._verdict(self._observe(model, name, device))

    def judge_built(self, candidate: Candidate) -> Verdict:
        """Build the model, and compare it. A wrong schedule is named too: that takes a second
        checkpoint.

        Raises:
            GLM5PatchError: the model can't be built or called, or returns no logits.
        """
        with candidate.built(self.checkpoint) as model:
            seen = self._observe(model, candidate.name, candidate.device)
        return self._verdict(seen, candidate)

    def _observe(self, model, name: str, device: str) -> Seen:
        ids, vocab_size = self.ids.to(device), self.config.vocab_size
        with recorded_layers(model, self.config.num_hidden_layers, BATCH) as hidden:
            logits = logits_of(model, ids, vocab_size, name)
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        changed = token_errors(logits, logits_of(model, other, vocab_size, name))[:, :-1]
        return Seen(logits, hidden, leaks=bool(((changed > BOUND) & changed.isfinite()).any()))

    def _verdict(self, seen: Seen, candidate: Candidate | None = None) -> Verdict:
        explainer = self.explainer
        errors = token_errors(explainer.forward(explainer.right).logits, seen.logits)
        explanations, fit = self._explain(seen, errors.max().item(), candidate)
        within, beyond = errors[explainer.within], errors[~explainer.within]
        verdict = Verdict(within.max().item(), beyond.max().item(), explanations, fit)
        if not explanations:
            verdict.remarks = list(self._remarks(seen, verdict))
        return verdict

    def _explain(
        self, seen: Seen, error: float, candidate: Candidate | None
    ) -> tuple[list[Faults], Fit | None]:
        """By what is simplest: a fault, a schedule, a value, several faults, a value with some."""
        explain = partial(self.explainer.explain, seen.logits, seen.leaks)
        if not seen.logits.isfinite().all():
            return [], None
        if (found := explain(most=1)) or error <= ROUNDING:
            return found, None
        of_all = self._seen_with_all_indexers(candidate)
        if found := self._explain_schedule(of_all, most=1):
            return found, None
        if fit := self.explainer.fit_listed(seen.logits):
            return explain(most=1, base=self._with(fit)), fit
        if of_all is not None and (fit := self.explainer.fit_schedule(of_all.logits)):
            base = self._with(fit)
            return self.explainer.explain(of_all.logits, of_all.leaks, most=1, base=base), fit
        if found := explain() or self._explain_schedule(of_all):
            return found, None
        if fit := self.explainer.fit(seen.logits):
            return explain(base=self._with(fit)), fit
        return [], None

    def _with(self, fit: Fit) -> Conventions:
        return replace(self.explainer.right, **{fit.setting: fit.value})

    def _explain_schedule(self, of_all: Seen | None, most: int = MOST) -> list[Faults]:
        if of_all is None:
            return []
        found = self.explainer.explain(of_all.logits, of_all.leaks, most, all_indexers=True)
        return [faults for faults in found if any(fault.all_indexers for fault in faults)]

    def _seen_with_all_indexers(self, candidate: Candidate | None) -> Seen | None:
        """A model that runs the indexers of other layers finds no weights there, and its logits are
        anybody's guess. So it gets some. None if its loader refuses weights that no GLM-5 has."""
        if candidate is None or "shared" not in self.config.indexer_types:
            return None
        directory = self._saved("glm5-with-all-indexers", all_indexers=True)
        try:
            with candidate.built(directory) as model:
                return self._observe(model, candidate.name, candidate.device)
        except GLM5PatchError:
            return None

    def _remarks(self, seen: Seen, verdict: Verdict) -> Iterator[str]:
        topk, logits = self.config.index_topk, seen.logits
        if not logits.isfinite().all():
            b, token = (~logits.isfinite()).any(-1).nonzero()[0].tolist()
            yield f"Logits are not finite, first at token {token} of sequence {b}."
        elif verdict.within <= BOUND:
            yield (
                f"The first {topk} tokens, which attend to everything before them, are right. "
                "Later ones are not: the selection of keys differs, and nothing else."
            )
        else:
            yield (
                f"The first {topk} tokens, which attend to everything before them, differ. So the "
                "difference is not, or not only, in the selection of keys."
            )
        if max(verdict.within, verdict.beyond) <= ROUNDING:
            yield "All differences are small: look at the precision, such as TF32 or bf16."
        if seen.leaks:
            yield "The logits of a token depend on later tokens: look at the causal mask."
        if where := self._first_layer(seen.hidden):
            yield where
        if verdict.fit is not None:
            yield f"The first {topk} tokens are about those of {verdict.fit}."
        elif (nearest := self.explainer.nearest(logits)) is not None:
            fault, share = nearest
            yield (
                f"Nearest is {fault.id}, under which {share:.0%} of the tokens agree: "
                f"{fault.means} Look at: {fault.look_at}."
            )

    def _first_layer(self, hidden: list[Tensor]) -> str | None:
        expected = self.explainer.reference(self.ids, self.explainer.right).hidden
        if [one.shape for one in hidden] != [one.shape for one in expected]:
            return None
        for number, (ours, theirs) in enumerate(zip(expected, hidden), 1):
            wrong = token_errors(ours, theirs) > HIDDEN_BOUND
            if wrong.any():
                kind = self.config.indexer_types[number - 1]
                layer = "a computing layer" if kind == "full" else "a skip layer"
                first = int(wrong.any(0).nonzero()[0])
                return (
                    f"The output of layer {number}, {layer}, is the first to differ, from token "
                    f"{first} on."
                )
        return "The outputs of all layers are right: look at the final norm and the output layer."

    def assert_matches(self, model: Any, allow: Collection[str] = ()) -> None:
        """Raise AssertionError with the names of the mistakes, unless the model is right.

        Args:
            model: see ``judge``.
            allow: faults that are not to count, such as ``latent_norm_eps``.
        """
        _check(self.judge(model), allow)

    def assert_builds(self, function: Callable[[Path], Any], allow: Collection[str] = ()) -> None:
        """The same for a function that builds the model from a directory; see ``Candidate``."""
        name = getattr(function, "__qualname__", repr(function))
        _check(self.judge_built(Candidate(function, name)), allow)


def _check(verdict: Verdict, allow: Collection[str]) -> None:
    if not verdict.passed(known(allow)):
        raise AssertionError("\n".join(verdict.lines()))
