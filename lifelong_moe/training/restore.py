"""Models of committed stages, and untrained ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.storage.stored import naming
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.fitting import require_fitting


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
    with nullcontext() if own else _without_memory():
        model = LanguageModel(architecture)
    require_fitting(model, tensors)
    if not own:
        with _Undrawn():  # each weight is about to be overwritten
            model = LanguageModel(architecture)
    model.load_state_dict(tensors, strict=True)
    if not all(layer.banks.has_sound_bases() for layer in model.moe_layers()):
        raise CorruptError("a low-rank expert changes none of the older experts.")
    return model


@contextmanager
def _without_memory() -> Iterator[None]:
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Context in which ``nn.init`` draws nothing; without memory to draw into, it would still import the compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def _experts(architecture: Architecture) -> int:
    return sum(architecture.experts_in(layer) for layer in range(architecture.model.layers))


def initial_model(architecture: Architecture, seed: int) -> LanguageModel:
    """The untrained model that a first stage begins with."""
    model = LanguageModel(architecture)
    initialize(model, seed)
    return model
