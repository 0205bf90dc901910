"""A Hugging Face directory through Megatron-Bridge: LoRA, full fine-tuning, and back."""

import copy
import importlib.util
import json
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file

import glm5_patch
from glm5_patch.checkpoint.bridge_report import checked, report
from glm5_patch.checkpoint.dequantize import write_dequantized
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.env import installed_version
from glm5_patch.errors import CheckpointError
from glm5_patch.patches.megatron_bridge.glm5_provider import _DESCRIBES_THE_MODEL
from glm5_patch.patches.table import PATCHES
from tests.checkpoint.fp8 import quantize
from tests.hosts import tables
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import (
    CPU,
    EXPERTS,
    MLA,
    STEPS,
    build,
    hugging_face,
    logits,
    provider_of,
    tensors_in,
    train,
    write_checkpoint,
)
from tests.tiny import add_mtp_layer, tokens

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)
standin.install()

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402

ROOT = Path(__file__).parents[3]


class Run:
    """One flavour from its directory to LoRA and full fine-tuning, and what came of it."""

    def __init__(self, folder: Path, flavour: str):
        self.flavour, self.source = flavour, folder / "source"
        write_checkpoint(self.source, flavour)
        self.bridge = AutoBridge.from_hf_pretrained(str(self.source))
        self.ids = tokens(7, 2, 64)
        self.loaded, self.full, self.merged, self.adapter = (
            folder / name for name in ("loaded", "full", "merged", "adapter")
        )
        self.ours = {}
        self._full_fine_tuning()
        self._lora()
        self.theirs = self._oracle(folder)

    def _full_fine_tuning(self) -> None:
        self.plain = model = build(self.bridge, CPU)
        self.ours["source"] = logits(model, self.ids)
        self.bridge.save_hf_pretrained([model], str(self.loaded))
        self.full_losses = train(model, self.ids)
        self.ours["full"] = logits(model, self.ids)
        self.bridge.save_hf_pretrained([model], str(self.full))

    def _lora(self) -> None:
        lora = LoRA(target_modules=[*MLA, "linear_proj", *EXPERTS], dim=4, alpha=8)
        chunks = lora([build(self.bridge, CPU)], training=True)
        self.model = chunks[0]
        before = {n: p.clone() for n, p in self.model.named_parameters()}
        self.lora_losses = train(self.model, self.ids)
        after = dict(self.model.named_parameters())
        self.moved = {n for n in before if not torch.equal(before[n], after[n])}
        self.trainable = {n for n, p in after.items() if p.requires_grad}
        self.ours["merged"] = self.ours["adapter"] = logits(self.model, self.ids)
        self.bridge.save_hf_pretrained(chunks, str(self.merged))
        self.bridge.save_hf_adapter(
            chunks, self.adapter, peft_config=lora, base_model_name_or_path=str(self.source)
        )

    def _oracle(self, folder: Path) -> dict[str, torch.Tensor]:
        places = {
            "source": str(self.source),
            "full": str(self.full),
            "merged": str(self.merged),
            "adapter": f"{self.source}+{self.adapter}",
        }
        found = hugging_face(places.values(), self.ids, folder)
        return {name: found[where] for name, where in places.items()}


@pytest.fixture(scope="module", params=["5.2", "5.1"])
def run(request, world, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("bridge"), request.param)


def test_the_patches_are_in_place(run):
    ids = [patch.id for patch in PATCHES if patch.host == "megatron.bridge"]
    rows = glm5_patch.require(*ids)
    release = installed_version("megatron-bridge")
    if release is not None:  # else a source tree, of which no states are recorded
        recorded = tables.read()["megatron-bridge"][release]["states"]
        assert {i: rows[i].state.value for i in ids} == {i: recorded[i][0] for i in ids}


def copied(run, folder, change=lambda tensors: None):
    """The checkpoint of a run with other tensors, and an AutoBridge of it."""
    directory = Path(shutil.copytree(run.source, folder / "copy"))
    tensors = tensors_in(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, AutoBridge.from_hf_pretrained(str(directory))


def test_the_report_of_a_conversion(run, caplog, tmp_path):
    survey = report(run.bridge, run.plain)
    assert survey.read == tuple(sorted(tensors_in(run.source)))
    skip = {"5.2": (3, 4, 5, 7), "5.1": ()}[run.flavour]
    absent = {int(name.split(".")[2]) for name in survey.expected_absent}
    assert absent == set(skip) and len(survey.expected_absent) == 5 * len(skip)
    assert not (survey.missing or survey.dropped or survey.mtp or survey.unexpected)
    caplog.set_level(logging.INFO, "glm5_patch")
    run.bridge.save_hf_pretrained([build(run.bridge, CPU)], str(tmp_path / "out"))
    lines = [r.getMessage() for r in caplog.records if r.name == "glm5_patch"]
    count = len(survey.read)
    assert f"{count} tensors read; {len(survey.expected_absent)} indexer tensors of" in lines[-2]
    assert lines[-1] == f"glm5-patch: {count} tensors written"


def test_a_model_is_written_by_its_configuration_alone(run, tmp_path):
    """Without a checkpoint to compare with there is no report."""
    bridge = AutoBridge.from_hf_config(run.bridge.hf_pretrained.config)
    with pytest.raises(CheckpointError, match="made of a configuration"):
        report(bridge, run.plain)
    bridge.save_hf_weights([run.plain], str(tmp_path / "out"))
    assert tensors_in(tmp_path / "out").keys() == tensors_in(run.source).keys()


@pytest.mark.parametrize("name", ["self_attn.indexer.wk.weight", "mlp.experts.3.up_proj.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name, run, tmp_path):
    """Bridge itself warns, and leaves the parameter as it was drawn."""
    name = f"model.layers.6.{name}"
    _, bridge = copied(run, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        build(bridge, CPU)


def test_what_the_model_does_not_have_is_left_out_when_it_is_written(run, tmp_path):
    """An MTP layer, an indexer on a skip layer, a stranger: in the one file with all the rest."""

    def change(tensors):
        tensors["model.stranger"] = torch.ones(2)
        if run.flavour == "5.2":
            extra = tensors["model.layers.2.self_attn.indexer.wk.weight"].clone()
            tensors["model.layers.3.self_attn.indexer.wk.weight"] = extra

    directory, _ = copied(run, tmp_path, change)
    mtp = add_mtp_layer(directory)
    bridge = AutoBridge.from_hf_pretrained(str(directory))
    with pytest.warns(RuntimeWarning, match="model.stranger is no tensor of this model"):
        model = build(bridge, CPU)
    survey = report(bridge, [model])
    assert survey.mtp == tuple(sorted(mtp)) and survey.unexpected == ("model.stranger",)
    assert len(survey.dropped) == (run.flavour == "5.2")
    bridge.save_hf_pretrained([model], str(tmp_path / "out"))
    before, after = tensors_in(run.source), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_conversion_that_stops_short_is_an_error(run):
    whole = [(name, tensor) for name, tensor in tensors_in(run.source).items()]
    assert list(checked(whole, run.bridge.hf_pretrained, run.plain)) == whole
    with pytest.raises(CheckpointError, match=f"and not {whole[5][0]} .of 1 such.*no whole model"):
        list(checked(whole[:5] + whole[6:], run.bridge.hf_pretrained, run.plain))


@pytest.mark.parametrize("what", ["source", "full", "merged", "adapter"])
def test_logits_are_hugging_faces(run, what):
    """As loaded; after full fine-tuning; after LoRA, merged and as an adapter of PEFT."""
    assert (run.ours[what] - run.theirs[what]).abs().max() < 5e-5
    if what != "source":
        assert (run.ours[what] - run.ours["source"]).abs().max() > 0.1


def test_what_was_loaded_is_written_back(run):
    before, after = tensors_in(run.source), tensors_in(run.loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    indexers = {int(name.split(".")[2]) for name in after if ".indexer." in name}
    assert indexers == ({0, 1, 2, 6} if run.flavour == "5.2" else set(range(8)))


def test_training_learns(run):
    for losses in (run.full_losses, run.lora_losses):
        assert len(losses) == STEPS
        assert losses[-1] < losses[0] - 0.1


def test_lora_moves_the_adapters_alone_on_every_layer(run):
    assert run.trainable == run.moved
    assert all(".adapter." in name for name in run.trainable)
    for layer in range(8):  # skip layers included
        inside = {n for n in run.trainable if n.startswith(f"decoder.layers.{layer}.")}
        for projection in (*MLA, "linear_proj"):
            assert any(f".{projection}." in name for name in inside)
        assert any(".experts." in name for name in inside) == (layer >= 3)


def test_the_provider_is_that_of_config_json(run):
    hf = HFConfig(json.loads((run.source / "config.json").read_text()))
    provider, expected = provider_of(run.bridge, CPU), hf.megatron_kwargs()
    for name in (*(n for n in expected if n.startswith("dsa_")), "rotary_base", "num_moe_experts"):
        assert getattr(provider, name) == expected[name]
    assert provider.qk_pos_emb_head_dim == 16
    assert not hasattr(run.bridge.hf_pretrained.config, "indexer_rope_interleave")


def test_the_provider_travels(run):
    """Copied, pickled, and written as YAML that names nothing of this package."""
    import yaml
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers

    provider = provider_of(run.bridge, CPU)
    again = pickle.loads(pickle.dumps(copy.deepcopy(provider)))
    assert again.dsa_indexer_types == provider.dsa_indexer_types
    assert again.transformer_layer_spec is provider.transformer_layer_spec
    with safe_yaml_representers():  # as run_config.yaml is written beside a checkpoint
        text = yaml.safe_dump(_ConfigContainerBase._convert_value_to_dict(provider))
    assert yaml.safe_load(text)["dsa_indexer_types"] == provider.dsa_indexer_types
    assert "get_transformer_block_with_experimental_attention_variant_spec" in text
    assert "glm5_patch" not in text


def test_the_published_config_under_this_transformers():
    """GLM-5.2's own config.json, which several releases spoil when they read it."""
    published = json.loads((ROOT / "tests" / "configs" / "glm-5.2.json").read_text())
    config = transformers.AutoConfig.for_model(**published)
    bridge = AutoBridge.from_hf_config(config)
    provider = bridge._model_bridge.provider_bridge(SimpleNamespace(config=config))
    expected = HFConfig(published).megatron_kwargs()
    for name in (*_DESCRIBES_THE_MODEL, *(n for n in expected if n.startswith("dsa_"))):
        assert getattr(provider, name) == expected[name], name
    assert provider.dsa_indexer_types.count("full") == 21


@pytest.mark.parametrize("layer", ["transformer_layer", "mtp_model_layer"])
def test_every_parameter_of_an_mtp_layer_is_mapped(run, layer):
    """Under its name on megatron-core 0.16, and on later ones."""
    bridge = type(run.bridge._model_bridge)()
    bridge.hf_config = SimpleNamespace(num_hidden_layers=8, num_nextn_predict_layers=1)
    registry = bridge.mapping_registry()
    last = "decoder.layers.6."  # a MoE layer that computes its top-k
    names = [n for n, _ in run.plain.named_parameters() if n.startswith(last)]
    for name in names:
        found = registry.megatron_to_hf_lookup(name.replace(last, f"mtp.layers.0.{layer}."))
        theirs = found.hf_param if isinstance(found.hf_param, str) else found.hf_param["gate"]
        assert theirs.startswith("model.layers.8."), name
    for name in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
        assert registry.megatron_to_hf_lookup(f"mtp.layers.0.{name}.weight")


def test_block_fp8_is_read_as_its_dequantised_twin(run, tmp_path):
    fp8, twin = tmp_path / "fp8", tmp_path / "twin"
    shutil.copytree(run.source, fp8)
    quantize(fp8)
    write_dequantized(HFCheckpoint(fp8), twin)
    bridges = [AutoBridge.from_hf_pretrained(str(directory)) for directory in (fp8, twin)]
    ours, theirs = (logits(build(bridge, CPU), run.ids) for bridge in bridges)
    assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match="checkpoint dequantize"):
        bridges[0].save_hf_pretrained([build(bridges[0], CPU)], str(tmp_path / "out"))
