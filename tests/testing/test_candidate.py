"""Anybody's model is found, built and called, or the error says what is wrong with it."""

import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.testing.oracle import Oracle
from glm5_patch.testing.oracle.candidate import Candidate, logits_of
from tests.activation.fresh import environment
from tests.testing.seeded import load

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_glm5.py"
B, S, VOCAB = 2, 5, 7
needs_core = pytest.mark.skipif(
    find_spec("megatron") is None, reason="megatron-core is not installed"
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return Oracle(tmp_path_factory.mktemp("oracle"), seed=1)


@pytest.mark.parametrize("function", ["hugging_face", "ids_to_logits"])
def test_the_examples_are_right(oracle, function):
    assert oracle.judge_built(Candidate.named(f"{EXAMPLE}:{function}")).right


def test_a_class_of_transformers_is_built_by_from_pretrained(oracle):
    assert oracle.judge_built(Candidate.named("transformers:GlmMoeDsaForCausalLM")).right


@needs_core
@pytest.mark.parametrize(
    "target",
    [f"{EXAMPLE}:megatron", f"{EXAMPLE}:layers", "glm5_patch.attention.spec:get_glm5_spec"],
    ids=["module", "spec", "spec of args"],
)
def test_a_megatron_module_is_called_with_positions_and_no_mask(world, oracle, target):
    """Its latent norms have the epsilon of the other norms."""
    verdict = oracle.judge_built(Candidate.named(target))
    assert [[fault.id for fault in one] for one in verdict.explanations] == [["latent_norm_eps"]]
    assert verdict.passed(["latent_norm_eps"]) and not verdict.passed()


@needs_core
@pytest.mark.nightly
@pytest.mark.parametrize("function", ["megatron", "layers", "megatron_in_a_world_of_its_own"])
def test_a_megatron_module_needs_no_world(function):
    command = [sys.executable, "-m", "glm5_patch", "verify", "--model", f"{EXAMPLE}:{function}"]
    allow = subprocess.run(
        [*command, "--allow", "latent_norm_eps"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert allow.returncode == 0 and "allowed: latent_norm_eps" in allow.stdout, allow.stderr


def test_a_file_may_have_the_name_of_what_it_imports(tmp_path):
    """A file my_trainer.py that imports my_trainer, and a module beside it."""
    (tmp_path / "wrapt.py").write_text(
        "import wrapt, beside_it\ndef build(directory):\n    return wrapt.decorator and directory\n"
    )
    (tmp_path / "beside_it.py").write_text("")
    with Candidate.named(f"{tmp_path / 'wrapt.py'}:build").built(tmp_path) as made:
        assert made == tmp_path


def test_what_a_function_sets_up_is_taken_down(oracle):
    events = []

    @contextmanager
    def build(directory):
        events.append(directory)
        yield load(directory)
        events.append("down")

    oracle.assert_builds(build)
    assert events == [oracle.checkpoint, "down"]


class Wrapper(torch.nn.Module):
    """As ``Float16Module`` and ``DistributedDataParallel``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


class WantsPositions(torch.nn.Module):
    def forward(self, input_ids, position_ids, attention_mask, labels=None):
        assert position_ids.tolist() == [[0, 1, 2, 3, 4]] * B and attention_mask is None
        return torch.ones(B, S, VOCAB)


LOGITS = torch.ones(B, S, VOCAB)
GOOD = {
    "tensor": lambda ids: LOGITS,
    "tuple": lambda ids: (LOGITS, None),
    "dict": lambda ids: {"logits": LOGITS},
    "output": lambda ids: SimpleNamespace(logits=LOGITS),
    "padded vocabulary": lambda ids: torch.ones(B, S, VOCAB + 3),
    "float64": lambda ids: LOGITS.double(),
    "positions": WantsPositions(),
    "wrapped": Wrapper(Wrapper(WantsPositions())),
    "any arguments": lambda *args: LOGITS,
}


def needs_labels(ids, labels):
    return LOGITS


def raises(ids):
    raise IndexError("index 9 is out of bounds")


def half(ids):
    return LOGITS.half()


BAD = {
    "3 can't": (3, "returned int, which can't be called"),
    "labels": (needs_labels, "the model needs labels beside the ids"),
    "raises": (raises, r"raised for ids \[2, 5\]: IndexError: index 9 .*test_candidate.py:\d+"),
    "list": (lambda ids: [1], "returned int; it must return logits"),
    "none": (lambda ids: None, "returned NoneType"),
    "flat": (lambda ids: LOGITS.flatten(0, 1), r"a tensor \[10, 7\]; .*\[2, 5, 7\] \(b, s, vocab"),
    "turned": (lambda ids: LOGITS.transpose(0, 1), r"\[5, 2, 7\].*transpose the first two"),
    "small": (lambda ids: LOGITS[..., 1:], r"a tensor \[2, 5, 6\]"),
    "half": (half, "the logits are torch.float16; .*torch.float32"),
    "bf16": (torch.nn.Linear(2, 2).bfloat16(), "weight is torch.bfloat16.*torch.float32"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_any_kind_of_model_is_called(kind):
    ids = torch.zeros(B, S, dtype=torch.long)
    assert torch.equal(logits_of(GOOD[kind], ids, VOCAB), LOGITS)


@pytest.mark.parametrize("kind", BAD)
def test_a_model_that_gives_no_logits_is_told_why(kind):
    model, message = BAD[kind]
    with pytest.raises(GLM5PatchError, match=f"^mine.*{message}"):
        logits_of(model, torch.zeros(B, S, dtype=torch.long), VOCAB, "mine")


TARGETS = {
    "no_such_module:f": "no_such_module can't be imported: ModuleNotFoundError",
    "MINE.py:nothing": "has no 'nothing'; it has .*fails.*number",
    "MINE.py:number": "number is of type int, which can't be called",
    "MINE.py:fails": r"fails raised: ValueError: no weights \(.*mine.py:4\)",
    "MINE.py:leaves": "leaves raised: SystemExit: 3",
    "MISSING.py:f": "no such file",
    "BROKEN.py:f": r"broken.py can't be imported: NameError: name 'undefined' .*broken.py:1\)",
    ":f": "must be MODULE:FUNCTION or PATH.py:FUNCTION",
    "torch:": "must be MODULE:FUNCTION or PATH.py:FUNCTION",
}


@pytest.mark.parametrize("target, message", TARGETS.items(), ids=TARGETS)
def test_a_function_that_can_t_be_used_is_told_why(tmp_path, target, message):
    (tmp_path / "broken.py").write_text("undefined\n")
    (tmp_path / "mine.py").write_text(
        "import sys\nnumber = 3\ndef fails(directory):\n"
        "    raise ValueError('no weights')\ndef leaves(directory):\n    sys.exit(3)\n"
    )
    for name in ("mine", "missing", "broken"):
        target = target.replace(f"{name.upper()}.py", str(tmp_path / f"{name}.py"))
    with pytest.raises(GLM5PatchError, match=message):
        with Candidate.named(target).built(tmp_path):
            pass
