"""The teacher: the previous stage's model, sharing every tensor that cannot change."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain

import torch
from torch import Tensor, nn

from lifelong_moe.config.retention import DistillConfig, DistillText
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.model.transformer import LanguageModel


def make_teacher(model: LanguageModel, shared: Iterable[Tensor]) -> LanguageModel:
    """Copy a model as it is now; tensors in ``shared`` are the same objects in both and take no memory.

    Args:
        model: The previous stage's model, before growth.
        shared: Tensors that this stage will not train.

    Returns:
        A model in evaluation mode without gradients.
    """
    teacher = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    return teacher.requires_grad_(False).eval()


def shared_blocks(student: LanguageModel, teacher: LanguageModel) -> int:
    """How many blocks from the bottom compute the same in both, so that once is enough.

    The embedding and those blocks must be the same frozen tensors, and nothing in them may depend on training mode, on
    groups, or on more than a tensor says.
    """
    routing = student.architecture.routing
    same = isinstance(routing, LearnedConfig) and routing.capacity is None and not routing.jitter
    if not same or not student.head.is_one_matrix:
        return 0
    if routing.has_bundles or not teacher.head.is_one_matrix or not _same(student.embedding, teacher.embedding):
        return 0
    pairs = list(zip(student.blocks, teacher.blocks, strict=False))[:-1]
    return next((i for i, (mine, theirs) in enumerate(pairs) if not _same(mine, theirs)), len(pairs))


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules have the same tensors, and none of them trains; rows for no expert count for nothing."""
    ours, others = (_tensors(module) for module in (mine, theirs))
    return ours.keys() == others.keys() and all(t is others[n] and not t.requires_grad for n, t in ours.items())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.numel()}


def distilled_rows(replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig) -> Tensor:
    """Which sequences of a batch are distilled on: a pure function of each sequence's place in the stage.

    Args:
        replayed_B: True for replayed sequences, bool ``(B,)``.
        ordinal_B: How many sequences of the same kind came before it in the stage, int64 ``(B,)``.
        config: ``text`` chooses new or replayed ones, ``fraction`` the share of them, spread evenly.

    Returns:
        Their indices, int64, ascending; empty if there are none.
    """
    share = Fraction(str(config.fraction))
    chosen_B = (ordinal_B + 1) * share.numerator // share.denominator > ordinal_B * share.numerator // share.denominator
    wanted_B = replayed_B if config.text == DistillText.replay else ~replayed_B
    return torch.nonzero(wanted_B & chosen_B).flatten()
