"""What a megatron-core release can do: shapes, never versions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from argparse import ArgumentParser
from types import ModuleType, SimpleNamespace

from . import names_read_by


def missing_fields(config_class: type, template: type) -> list[dataclasses.Field]:
    """The fields of the dataclass ``template`` that ``config_class`` does not have."""
    have = {field.name for field in dataclasses.fields(config_class)}
    return [field for field in dataclasses.fields(template) if field.name not in have]


def one_sided_flags(config_class: type) -> list[dataclasses.Field]:
    """The sparse attention's booleans that a command line can only turn one way."""
    return [
        field
        for field in dataclasses.fields(config_class)
        if field.name.startswith("dsa_")
        and isinstance(field.default, bool)
        and "argparse_meta" not in field.metadata
    ]


def why_arguments_fail(config_class: type) -> str | None:
    """What keeps a command line from being made of the sparse attention's fields.

    Megatron-LM's parser is made of all fields of ``TransformerConfig``, for every model: one
    field of a type that it does not know stops every launch.
    """
    own = [f for f in dataclasses.fields(config_class) if f.name.startswith("dsa_")]
    for field in own:
        if isinstance(field.type, str):
            return f"the type of {field.name} is the string {field.type!r}"
    try:
        from megatron.training.argument_utils import ArgumentGroupFactory
    except Exception:  # not in this wheel, or without what it needs
        return None
    others = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in own}
    try:
        ArgumentGroupFactory(config_class, exclude=list(others)).build_group(ArgumentParser())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def refuses_context_parallel() -> bool:
    """Whether the configuration refuses DSA with context parallelism (megatron-core 0.16 to 0.18).

    It builds a configuration, which on core main imports models: never call it while the host is
    being imported.

    Raises:
        AssertionError: it refuses this DSA model without context parallelism too.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own defaults, which are none of the user's
        config = TransformerConfig(
            num_layers=1, hidden_size=64, num_attention_heads=4, add_bias_linear=False
        )
        config.experimental_attention_variant = "dsa"
        validate = inspect.unwrap(TransformerConfig.__post_init__)
        validate(config)
        config.context_parallel_size, config.cp_comm_type = 2, "allgather"
        try:
            validate(config)
        except AssertionError:
            return True
    return False


def refuses_dsa() -> bool:
    """Whether the host builds no DSA model at all (megatron-core 0.16 and 0.17).

    It imports the host's spec builders: never call it while the host is being imported.
    """
    try:
        from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    except ImportError:
        return False  # a core from before DSA; building it fails with the host's own words
    build = inspect.unwrap(specs.get_experimental_attention_variant_module_spec)
    try:
        build(config=_ProbeConfig(**_PROBE_LAYER), backend=_ProbeBackend())
    except ValueError:
        return True
    return False


class _ProbeNorm:
    """Stands for whatever norm a backend would use."""


class _ProbeLinear:
    """Stands for whatever linear layer a backend would use."""


class _ProbeFusedLinear:
    """Stands for a linear layer with the norm before it fused in."""


class _ProbeBackend:
    def layer_norm(self, rms_norm=False, for_qk=False, **_):
        return _ProbeNorm

    def column_parallel_layer_norm_linear(self):
        return _ProbeFusedLinear

    def linear(self):
        return _ProbeLinear

    column_parallel_linear = row_parallel_linear = linear


_PROBE_LAYER = dict(
    experimental_attention_variant="dsa",
    multi_latent_attention=True,
    qk_l2_norm=False,
    qk_layernorm=True,
    normalization="RMSNorm",
    transformer_impl="transformer_engine",
)


class _ProbeConfig(SimpleNamespace):
    """Some settings of a configuration; all others have the host's defaults."""

    def __getattr__(self, name: str):
        from megatron.core.transformer.transformer_config import MLATransformerConfig

        return getattr(MLATransformerConfig, name)


def why_dsa_spec_is_wrong(module: ModuleType) -> str | None:
    """What the host's dispatcher makes of a GLM-5 layer, tried on stand-in modules.

    megatron-core 0.16 and 0.17 raise; 0.18 gives a spec whose latent norm is fused into the up
    projection, so the indexer sees the raw latent; 0.19's is right.
    """
    try:
        spec = module.get_experimental_attention_variant_module_spec(
            config=_ProbeConfig(**_PROBE_LAYER), backend=_ProbeBackend()
        )
    except ValueError:
        return "the dispatcher raises ValueError for 'dsa'"
    if spec.submodules.q_layernorm is not _ProbeNorm:
        return "the indexer gets the query latent before its norm"
    if not shares_topk(module):
        return "the host's DSAttention has no index sharing"
    return why_indexer_is_wrong(module.DSAIndexer)


def why_indexer_is_wrong(indexer_class: type) -> str | None:
    """What the host's indexer can't be set to do as GLM-5's; megatron-core 0.19's can do it all."""
    if not _ropes_leading_slice(indexer_class):
        return "the indexer's rope is not interleaved on the leading slice"
    for method, setting in (
        ("forward_before_topk", "dsa_indexer_rotate_activation"),
        ("__init__", "dsa_indexer_k_norm_epsilon"),
    ):
        if setting not in names_read_by(getattr(indexer_class, method)):
            return f"the indexer does not read {setting}"
    if "cu_seqlens" not in inspect.signature(indexer_class._apply_rope).parameters:
        return "the indexer's rope does not restart at the documents of a pack"
    return None


def _ropes_leading_slice(indexer_class: type) -> bool:
    """Whether the dot product of a rotated query and key is GLM-5's, tried on four dimensions.

    Rotated dimensions may come out in another order; a dot product does not see that.
    """
    import torch

    rope, angle = 4, 0.5
    stub = SimpleNamespace(
        index_head_dim=2 * rope,
        qk_pos_emb_head_dim=rope,
        pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)),
        config=_ProbeConfig(
            multi_latent_attention=True,
            rotary_interleaved=False,
            apply_rope_fusion=False,
            dsa_indexer_rope_interleaved=True,
        ),
    )
    # [position, 1, 1, rope]: position 1 turns the pair (0, 1) by an angle, and (2, 3) not at all.
    freqs = torch.tensor([[0.0] * 4, [angle, 0.0, angle, 0.0]])[:, None, None]
    key, query = torch.arange(1.0, 17.0).view(2, 1, 1, 8)
    at_both = lambda x: torch.stack([x.view(1, 1, 8)] * 2)
    k, q = (indexer_class._apply_rope(stub, at_both(x), freqs, 1.0) for x in (key, query))
    found = (k[0] * q[1]).sum()
    turned = torch.view_as_complex(query.flatten()[:2]) * torch.exp(torch.tensor(angle * 1j))
    expected = torch.cat([torch.view_as_real(turned), query.flatten()[2:]]) @ key.flatten()
    return bool((found - expected).abs() < 1e-3)


def shares_topk(module: ModuleType) -> bool:
    """Whether the host's own DSAttention shares top-k between layers (megatron-core 0.19 on)."""
    return hasattr(module.DSAttention, "_get_index_share_topk_holder")


def hangs_topk_on_arguments(dsa: ModuleType) -> bool:
    """Whether the shared top-k lives on the mask, the pack or the config, which outlive a forward.

    Raises:
        AttributeError: there is such a carrier, but nothing asks for it.
    """
    if not hasattr(dsa.DSAttention, "_get_index_share_carrier"):
        return False
    holder = dsa.DSAttention._get_index_share_topk_holder
    if "_get_index_share_carrier" not in names_read_by(holder):
        raise AttributeError("_get_index_share_topk_holder asks for no carrier any more")
    return True


def shares_by_freq_only(dsa: ModuleType) -> bool:
    """Whether the host shares top-k by freq and offset, and knows no list of types."""
    return hasattr(dsa, "is_dsa_skip_topk_layer")


def has_dsa_kernel_hooks(dsa: ModuleType) -> bool:
    """Whether fused kernels can take part in the host's attention (megatron-core 0.19 on).

    Raises:
        AttributeError: there are hooks, but other ones than are known.
    """
    hooks = getattr(dsa, "dsa_kernels", None)
    if hooks is None:
        return False
    attention = inspect.signature(hooks.run_fused_absorbed_sparse_attention)
    if "topk_length" not in attention.parameters:
        raise AttributeError("the hook for attention does not hand on how long a top-k is")
    return True


def scales_indexer_loss(schedules: ModuleType) -> bool:
    """Whether the schedules give the indexer loss a scale (megatron-core 0.19 on)."""
    names = names_read_by(schedules.forward_step_calc_loss)
    return any("experimental_attention" in name for name in names)


def lacks_te_linear(mla: ModuleType | None) -> bool:
    """Whether an imported MLA module has no class as TELinear (None, on 0.16 also a mock)."""
    return mla is not None and not isinstance(mla.TELinear, type)


def reads_unbound_gemm(moe_utils: ModuleType) -> bool:
    """Whether the router reads ``te_general_gemm``, which nothing bound (megatron-core 0.16)."""
    bound = hasattr(moe_utils, "te_general_gemm")
    return not bound and hasattr(moe_utils, "RouterGatingLinearFunction")


def rounds_expert_bias(router_class: type) -> bool:
    """Whether the expert bias of a router becomes bf16 with the rest of it."""
    import torch

    router = router_class.__new__(router_class)
    torch.nn.Module.__init__(router)
    router.register_buffer("expert_bias", torch.zeros(1))
    return router.bfloat16().expert_bias.dtype != torch.float32


def why_padding_is_counted(router_class: type) -> str | None:
    """What the router does to a ``padding_mask`` beside an expert bias, tried on three tokens, the
    last of which is padding.

    megatron-core 0.16 to 0.19 lay the mask [tokens] along the experts of the map [tokens, experts];
    where there are as many tokens as experts, they count wrong ones.
    """
    import torch

    if not hasattr(router_class, "_apply_expert_bias"):
        return None  # a core from before padding masks
    # The host compiles the method, which takes seconds and prints what the trial raises.
    apply_expert_bias = inspect.unwrap(router_class._apply_expert_bias)
    for experts in (2, 3):
        router = SimpleNamespace(
            enable_expert_bias=True,
            frozen_expert_bias=False,
            local_tokens_per_expert=torch.zeros(experts),
            config=SimpleNamespace(experimental_attention_variant="dsa", dsa_is_glm5=True),
        )
        routing_map = torch.ones(3, experts, dtype=torch.bool)
        padding_mask = torch.tensor([False, False, True])
        try:
            with torch.enable_grad():
                apply_expert_bias(router, routing_map, padding_mask=padding_mask)
        except RuntimeError:
            return "the router lays the padding mask along the experts"
        if (router.local_tokens_per_expert != 2).any():
            return "the router counts padded tokens"
    return None


def reads_unbound_fp8_state(random: ModuleType) -> bool:
    """Whether a checkpoint looks for fp8 state, which without Transformer Engine nothing binds."""
    takes_false_for_fp8 = random.CheckpointWithoutOutput(fp8=False).fp8
    return bool(takes_false_for_fp8) and not hasattr(random, "FP8GlobalStateManager")


def why_backend_refuses_local(module: ModuleType) -> str | None:
    """Whether the block spec builder takes ``transformer_impl="local"``."""
    config = _ProbeConfig(transformer_impl="local")
    try:
        backend = module._get_backend_spec_provider(config=config)
    except AssertionError:
        return "the block spec asserts transformer_impl == 'transformer_engine'"
    return None if hasattr(backend, "linear") else "LocalSpecProvider has no linear()"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine really imports, whatever the host's HAVE_TE flags say."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def frees_what_it_sends(schedules: ModuleType) -> bool:
    """Whether the interleaved schedule frees a stage's output without waiting for its send."""
    interleaved = inspect.unwrap(schedules.forward_backward_pipelining_with_interleaving)
    steps = [code for code in interleaved.__code__.co_consts if inspect.iscode(code)]
    after = [code for code in steps if code.co_name == "pp_post_forward"]
    return not any("deallocate_pipeline_outputs" in code.co_names for code in after)
