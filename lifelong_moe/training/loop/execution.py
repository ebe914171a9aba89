"""Contexts and process settings for the computation of a model in training."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of glibc's ``mallopt`` parameters in ``malloc.h``."""
MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
"""Variables by which a user chooses or configures an allocator."""


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensors, for the rest of this process and its forks.

    Returns:
        Whether it does: on Linux with glibc, unless the user has configured an allocator.
    """
    # A step allocates and frees the same large tensors again and again. Returned to the system each time, they cost a
    # tenth of a step or more in page faults.
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_SETTINGS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # No allocation by mmap, which free() always returns; and a trim threshold that the heap's top never reaches.
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_memory() -> None:
    """Return to the system what :func:`keep_freed_memory` has kept: a stage has ended, and another model is read."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextmanager
def execution_options(models: Iterable[LanguageModel], config: TrainerConfig) -> Iterator[None]:
    """Context in which models compute as ``trainer`` says; none of it changes results beyond rounding.

    Args:
        models: The student first, then its teacher.
        config: Implementation of experts, recomputation, compilation.

    Raises:
        ConfigError: If torch cannot compile.
    """
    models = list(models)
    layers = [layer for model in models for layer in model.moe_layers()]
    before = [layer.banks.implementation for layer in layers]
    try:
        for layer in layers:
            layer.banks.implementation = config.experts_implementation
        # If an older generation trains on, student and teacher hold their common experts in different orders. Joint
        # buffers would then be copied back and forth in every step.
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
            model._compiled_call_impl = None  # set by nn.Module.compile, which has no inverse


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Context in which products in float32 may round what they multiply to TF32: to 10 bits, where bfloat16 has 7."""
    if not on:  # as on a CPU, where the setting may mean something else
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def isolated_documents(models: Sequence[LanguageModel]) -> Iterator[None]:
    """Context in which attention stays within documents, whatever ``model.document_mask`` says."""
    # For fine-tuning: a pair shares its block with the same other pairs in every epoch, and a model that sees them
    # learns which answer follows which, not how to answer.
    try:
        for model in models:
            model.separates_documents = True
        yield
    finally:
        for model in models:
            model.separates_documents = model.architecture.model.document_mask


@contextmanager
def expert_dropout(model: LanguageModel, share: float) -> Iterator[None]:
    """Context in which a share of the experts' hidden units is dropped in training.

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
