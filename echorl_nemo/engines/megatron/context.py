"""Whole sequences on context-parallel ranks: in generation each rank works as a replica."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from echorl_nemo.engines.megatron.model_settings import rotary_embeddings


@contextmanager
def whole_sequences(model: Any) -> Iterator[None]:
    """Let a PolicyModel take whole sequences meanwhile: each context-parallel rank works on sequences of its own, as a
    replica does."""
    config = model.config
    if config.context_parallel_size == 1:
        yield
        return
    with ExitStack() as restore:
        for module in model.module.modules():
            if hasattr(module, "set_context_parallel_group"):  # Transformer Engine's attention
                own = (module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type)
                restore.callback(module.set_context_parallel_group, *own)
                module.set_context_parallel_group(None, None, None, module.cp_comm_type)
        for rotary in rotary_embeddings(model.module):
            restore.callback(_set_rotary_group, rotary, rotary.cp_group)
            _set_rotary_group(rotary, None)
        restore.callback(setattr, config, "context_parallel_size", config.context_parallel_size)
        config.context_parallel_size = 1
        yield


def _set_rotary_group(rotary: Any, group: Any) -> None:
    rotary.cp_group = group
    type(rotary).forward.cache_clear()  # it remembers embeddings by length only
