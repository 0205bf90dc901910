"""``GlmMoeDsaConfig``: what config.json says is what the configuration holds."""

from __future__ import annotations

from ...patching.patch import Finding, Patch
from ..probes.transformers import what_hf_config_spoils


class GlmMoeDsaConfigValues(Patch):
    id = "hf_config_values"
    module = "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa"
    attribute = "GlmMoeDsaConfig.__init__"
    why = "The rope width, the expert count or the index schedule of config.json is lost."
    upstream = "transformers 5.13.0"
    remove_when = "no supported transformers is older than 5.13"

    def needed(self, module) -> Finding:
        spoilt = what_hf_config_spoils(module.GlmMoeDsaConfig)
        return Finding(bool(spoilt), "; ".join(spoilt) or "every probed value survives")

    def apply(self, module, seams) -> None:
        seams.wrap(module.GlmMoeDsaConfig, "__init__", _init)

    def guards(self, config) -> bool:
        return False  # a Megatron configuration was made from it already, or not at all


def _init(wrapped, instance, args, kwargs):
    try:
        wrapped(*args, **kwargs)
    except Exception:
        if kwargs.get("layer_types") is None:
            raise
        # Every layer is of one type; its name changed between releases, each refusing the other's.
        kwargs = {name: value for name, value in kwargs.items() if name != "layer_types"}
        vars(instance).clear()
        wrapped(*args, **kwargs)
    said = {name: value for name, value in kwargs.items() if value is not None}
    _put_back_widths(instance, said)
    _put_back_experts(instance, said)
    _put_back_theta(instance, said)
    _put_back_schedule(instance, said)


def _put_back_widths(config, said: dict) -> None:
    """Some releases read ``head_dim`` as another name of ``qk_rope_head_dim``."""
    rope = said.get("qk_rope_head_dim")
    if rope is None or rope == config.qk_rope_head_dim == getattr(config, "head_dim", rope):
        return
    config.qk_rope_head_dim = config.head_dim = rope
    if "qk_head_dim" not in said:
        config.qk_head_dim = config.qk_nope_head_dim + rope


def _put_back_experts(config, said: dict) -> None:
    """Some releases have a ``num_experts`` beside ``n_routed_experts``, with a value of its own."""
    if "n_routed_experts" in said:
        config.n_routed_experts = said["n_routed_experts"]
    elif "num_experts" in said:
        return
    if getattr(config, "num_experts", config.n_routed_experts) != config.n_routed_experts:
        config.num_experts = config.n_routed_experts


def _put_back_theta(config, said: dict) -> None:
    nested = said.get("rope_parameters") or said.get("rope_scaling") or {}
    theta = nested.get("rope_theta") or said.get("rope_theta")
    found = config.rope_parameters or {}
    if theta is not None and found.get("rope_theta") != theta:
        config.rope_parameters = {"rope_type": "default", **found, "rope_theta": theta}


def _put_back_schedule(config, said: dict) -> None:
    """Some releases drop ``index_topk_freq``, or don't know ``index_skip_topk_offset``."""
    freq, offset = said.get("index_topk_freq"), said.get("index_skip_topk_offset")
    for name in ("index_topk_freq", "index_skip_topk_offset", "indexer_rope_interleave"):
        if name in said and getattr(config, name, None) != said[name]:
            setattr(config, name, said[name])
    if not freq or "indexer_types" in said or "index_topk_pattern" in said:
        return  # every release obeys a list, and without freq every layer computes
    from ...config.schedule import HF_DEFAULT_OFFSET, IndexSchedule
    from ...errors import ScheduleError

    try:
        schedule = IndexSchedule.from_freq(
            config.num_hidden_layers, freq, HF_DEFAULT_OFFSET if offset is None else offset
        )
    except ScheduleError:
        return  # transformers parses it all the same; it is refused where a model is made of it
    config.indexer_types = list(schedule.types)
