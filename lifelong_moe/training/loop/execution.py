"""How a model is computed while it trains. Nothing here changes what it learns, beyond rounding."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of glibc's ``mallopt`` parameters, from ``malloc.h``."""
MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
"""Variables by which a user has chosen an allocator, or how it works."""


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees, for the next tensor: its pages need not be made again.

    A step allocates and frees the same large tensors over and over; given back to the system each time, they cost a
    tenth of a step and more in page faults. Whoever has set up the allocator in the environment has the last word.

    Returns:
        Whether it was done: on Linux with glibc, for good, in this process and those it forks.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_SETTINGS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def executed(models: Iterable[LanguageModel], config: TrainerConfig) -> Iterator[None]:
    """Within this context models, the student first, are computed as ``trainer`` says.

    Raises:
        ConfigError: If torch cannot compile.
    """
    models = list(models)
    layers = [layer for model in models for layer in model.moe_layers()]
    before = [layer.banks.implementation for layer in layers]
    try:
        for layer in layers:
            layer.banks.implementation = config.experts_implementation
        # With an older generation training on, student and teacher want their common experts in different orders, and
        # would move them from one buffer to another and back.
        if models[0].architecture.continued is not None:
            for layer in (layer for model in models[1:] for layer in model.moe_layers()):
                layer.banks.implementation = ExpertsImplementation.slices
        for model in models:
            model.recompute(config.activation_checkpointing)
            if config.compile:
                model.compile()
        yield
    except Exception as error:
        if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"trainer.compile=true: torch cannot compile here ({reason}). Set it to false."
            ) from error
        raise
    finally:
        for layer, implementation in zip(layers, before, strict=True):
            layer.banks.implementation = implementation
        for model in models:
            model.recompute(False)
            model._compiled_call_impl = None  # what nn.Module.compile sets; it has no inverse


@contextmanager
def documents_apart(models: Sequence[LanguageModel]) -> Iterator[None]:
    """Within this context documents of a block do not see each other, with ``model.document_mask`` or without.

    Pairs share a block with the same others each epoch: seeing them, a model learns which answer follows
    which, and not what it answers.
    """
    try:
        for model in models:
            model.separates_documents = True
        yield
    finally:
        for model in models:
            model.separates_documents = model.architecture.model.document_mask


@contextmanager
def expert_dropout(model: LanguageModel, share: float) -> Iterator[None]:
    """Within this context hidden units of experts are dropped in training.

    Source:
        "Expert dropout" of Switch (arXiv:2101.03961), section 2.4: a higher dropout within experts when fine-tuning.
    """
    try:
        for layer in model.moe_layers():
            layer.banks.dropout = share
        yield
    finally:
        for layer in model.moe_layers():
            layer.banks.dropout = 0.0
