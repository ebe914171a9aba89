"""Models of committed stages, and untrained ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.ops.initializers import give_memory, without_memory
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.routing.buckets import add_missing_tables
from lifelong_moe.storage.stored import naming
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.fitting import require_fitting


def load_model(store: StageStore, stage: CommittedStage) -> LanguageModel:
    """The model as a stage committed it, on the CPU.

    Raises:
        CorruptError: If the stage's tensors are not those of its architecture.
    """
    forms = store.forms(stage)
    with naming(stage.path):
        model = _unfilled(stage.architecture, forms)
    _fill(model, forms, partial(store.read_into, stage))
    with naming(stage.path):
        _require_sound_bases(model)
    model.tokenizer_size = store.tokenizer(stage).vocab_size
    return model


def build_model(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    read: Callable[[Mapping[str, Tensor]], object] | None = None,
) -> LanguageModel:
    """A model from stored tensors, on the CPU.

    It is made without memory first, and then takes that of its own tensors alone.

    Args:
        architecture: Of the model.
        tensors: By name. Those without memory are read from where they are stored.
        read: Fills tensors by name, as :meth:`lifelong_moe.store.stages.StageStore.read_into` of a stage does.

    Raises:
        CorruptError: If the tensors are not those of the architecture.
    """
    model = _unfilled(architecture, tensors)
    _fill(model, tensors, read)
    _require_sound_bases(model)
    return model


def _unfilled(architecture: Architecture, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """The architecture's model with room for the tensors, which are required to fit."""
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
    give_memory(model)
    return model


@torch.no_grad()
def _fill(
    model: LanguageModel, tensors: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], object] | None
) -> None:
    """Read or copy each tensor to its place in the model, so that none is held twice."""
    places = model.state_dict()  # of experts, views of their generation's matrices
    if stored := {name: places[name] for name, tensor in tensors.items() if tensor.is_meta}:
        assert read is not None, "tensors without memory"
        read(stored)
    for name in tensors.keys() - stored.keys():
        places[name].copy_(tensors[name])
    filled = {name: places[name] for name in tensors}
    add_missing_tables(filled, model.table_names)
    for name in filled.keys() - tensors.keys():
        places[name].copy_(filled[name])
    # A router may conclude something from its tensors, such as whether centroids were fitted.
    for i, layer in enumerate(model.moe_layers()):
        names = layer.router.state_dict()
        layer.router.load_state_dict({name: places[f"blocks.{i}.moe.router.{name}"] for name in names})


def _require_sound_bases(model: LanguageModel) -> None:
    if not all(layer.banks.has_sound_bases() for layer in model.moe_layers()):
        raise CorruptError("a low-rank expert changes none of the older experts.")


def _experts(architecture: Architecture) -> int:
    return sum(architecture.experts_in(layer) for layer in range(architecture.model.layers))


def initial_model(architecture: Architecture, seed: int) -> LanguageModel:
    """The untrained model that a first stage begins with."""
    model = LanguageModel(architecture)
    initialize(model, seed)
    return model
