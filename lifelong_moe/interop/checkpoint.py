"""Checkpoints of transformers to models and back, in memory: ``config.json`` as data, tensors by their names on disk.

Neither direction needs transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.families import Family, read_family
from lifelong_moe.interop.layout.tensors import Stored, has_fused_experts, matched, stored_tensors
from lifelong_moe.interop.single import config_of, single_architecture, single_tensors
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, first_generation


def architecture_of(family: Family, stage: str) -> Architecture:
    """The architecture of a checkpoint.

    Args:
        family: Keys of its ``config.json``.
        stage: Name of the stage that its experts are attributed to, as one generation.
    """
    model = family.model()
    first = (first_generation(stage, model),)
    return Architecture(model, family.routing(), family.vocab_size, family.separator, first)


def from_checkpoint(config: Mapping[str, Any], tensors: Mapping[str, Tensor], stage: str = "base") -> LanguageModel:
    """Convert a checkpoint to a model whose experts are all of the first generation.

    Args:
        config: Its ``config.json``.
        tensors: By their names on disk, or with fused experts as in transformers' memory; of any floating-point type.
        stage: Name of the stage that the experts are attributed to.

    Returns:
        A float32 model on the CPU, all of it trainable.

    Raises:
        ConfigError: If we cannot express what the config asks for.
        CheckpointError: If a tensor is missing, unknown or of the wrong shape.
    """
    family = read_family(config, "config.json")
    model = LanguageModel(architecture_of(family, stage))
    shapes, ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.state_dict()
    expected = tensors_of(model.architecture, family, fused=has_fused_experts(tensors))
    for one in matched(expected, shapes, model.architecture.model, "the checkpoint"):
        found = tensors[one.name]
        if not one.ours and bool(found.any()):
            raise not_zero("the checkpoint", one.name)
        sources = found if one.stacked else [found] * len(one.ours)
        for target, source in zip(pieces(one, ours), sources, strict=True):
            target.copy_(source)
    begin_unread(model, family)
    return model


def to_checkpoint(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a model without bundles to the ``config.json`` and the tensors of the simplest architecture that has it.

    Args:
        model: With learned routing; not changed.

    Returns:
        JSON data, and copies of the weights on the CPU, ready for ``safetensors.torch.save_file``.

    Raises:
        ConfigError: If there is none.
    """
    single = single_architecture(model.architecture)
    config = config_of(single, {})
    ours = single_tensors(model.architecture, model.state_dict())
    return config, {one.name: written(one, ours) for one in tensors_of(single, read_family(config, "its config.json"))}


def tensors_of(single: Architecture, family: Family, *, fused: bool = False) -> Iterator[Stored]:
    """The tensors of a model of one generation as a checkpoint of a family has them."""
    return stored_tensors(family, single.model, single.model.experts_by_layer, fused=fused)


def not_zero(source: object, name: str) -> CheckpointError:
    """The refusal of a tensor that we have no place for, and which may be there only if it does nothing."""
    return CheckpointError(f"{source}: {name} is not all zeros; shared experts of Qwen2-MoE are not supported.")


def pieces(stored: Stored, ours: Mapping[str, Tensor]) -> list[Tensor]:
    """Views of what a checkpoint's tensor is of our tensors: one, or experts that are it once they are stacked."""
    found = [ours[name] for name in stored.ours]
    return found if stored.half is None else [one.chunk(2)[stored.half] for one in found]


def written(stored: Stored, ours: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy on the CPU of a tensor as a checkpoint has it, ready for ``safetensors.torch.save_file``."""
    if not stored.ours:
        return torch.zeros(stored.shape, dtype=dtype)
    (whole,) = [torch.stack(pieces(stored, ours))] if stored.stacked else pieces(stored, ours)
    # Contiguous, and no view: safetensors refuses both.
    return whole.detach().cpu().to(dtype).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def begin_unread(model: LanguageModel, family: Family) -> None:
    """Initialize what a checkpoint does not have: a dense model's router rows, one a layer.

    While there is one expert, its weight is 1 whatever its row is. Rows of later generations compete with it.
    """
    if family.is_mixture:
        return
    generator = torch.Generator().manual_seed(0)
    for layer in model.moe_layers():
        for rows in layer.router.row_generations():
            nn.init.normal_(rows, std=model.architecture.model.init_std, generator=generator)
