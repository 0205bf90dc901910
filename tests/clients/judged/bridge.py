"""Megatron-Bridge, for ``python -m tests.clients.judge``."""

from __future__ import annotations

from glm5_patch.attention.build import check_environment
from tests.clients.judged.core import _prepare
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU, provider_of


def with_the_plugin(directory):
    """Its provider and its conversion."""
    import transformers
    from tokenizers import Tokenizer, models

    standin.install()
    from megatron.bridge import AutoBridge
    from megatron.core.process_groups_config import ProcessGroupCollection

    words = {f"word{number}": number for number in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    bridge = AutoBridge.from_hf_pretrained(str(directory))
    provider = provider_of(bridge, CPU)
    provider.finalize()
    check_environment(provider)
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    return model


def released(directory):
    """The same with megatron-core's own DSA, with ``--released``."""
    standin.install()
    _prepare()
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    MLATransformerConfig.dsa_is_glm5 = True  # no field as released; what makes it run here asks
    return with_the_plugin(directory)
