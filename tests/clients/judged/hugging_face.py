"""Earlier releases of transformers, for ``python -m tests.clients.judge``."""


def with_its_default_attention(directory):
    from transformers import GlmMoeDsaForCausalLM

    return GlmMoeDsaForCausalLM.from_pretrained(directory)
