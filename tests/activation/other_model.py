"""A model of another kind, which must not notice this package."""


def output_shape(config_class) -> list[int]:
    """Build a small dense GPTModel and run it; needs initialised model parallelism."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = config_class(
        num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), 32, 16)
    ids = torch.zeros(1, 8, dtype=torch.long)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    return list(model(ids, ids, mask).shape)
