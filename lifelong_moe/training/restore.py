"""Models of committed stages, and untrained ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.storage.stored import naming
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.fitting import require_fitting
from lifelong_moe.training.loop.random_state import Undrawn, without_memory


def load_model(store: StageStore, stage: CommittedStage) -> LanguageModel:
    """The model as a stage committed it, on the CPU.

    Raises:
        CorruptError: If the stage's tensors are not those of its architecture.
    """
    tensors = store.tensors(stage)
    with naming(stage.path):
        model = build_model(stage.architecture, tensors)
    model.tokenizer_size = store.tokenizer(stage).vocab_size
    return model


def build_model(architecture: Architecture, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """A model from stored tensors, on the CPU.

    Raises:
        CorruptError: If the tensors are not those of the architecture.
    """
    layers, born = architecture.model.layers, architecture.generations
    # Each of these has a tensor of its own, so what is left takes no longer than the file that holds them.
    for count, what in ((layers, "layers"), (len(born), "generations"), (_experts(architecture), "experts")):
        if count > len(tensors):
            raise CorruptError(f"a stored architecture has {count:,} {what}, but {len(tensors):,} tensors.")
    # First without memory: what is stored may name a model that no machine holds. The user's own router may need
    # numbers to be built, and is code that the user trusts.
    own = isinstance(architecture.routing, CustomRouterConfig)
    with nullcontext() if own else without_memory():
        model = LanguageModel(architecture)
    require_fitting(model, tensors)
    if not own:
        with Undrawn():  # each weight is about to be overwritten
            model = LanguageModel(architecture)
    model.load_state_dict(tensors, strict=True)
    if not all(layer.banks.has_sound_bases() for layer in model.moe_layers()):
        raise CorruptError("a low-rank expert changes none of the older experts.")
    return model


def _experts(architecture: Architecture) -> int:
    return sum(architecture.experts_in(layer) for layer in range(architecture.model.layers))


def initial_model(architecture: Architecture, seed: int) -> LanguageModel:
    """The untrained model that a first stage begins with."""
    model = LanguageModel(architecture)
    initialize(model, seed)
    return model
