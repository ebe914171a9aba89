"""The teacher of distillation: the previous stage's model, which shares all frozen tensors with the student.

Legend: B sequences.
"""

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
    """Copy a model; tensors in ``shared`` are the same objects in both, and take no memory.

    Args:
        model: The previous stage's model, before growth.
        shared: Tensors that this stage will not train.

    Returns:
        A model in evaluation mode without gradients.
    """
    # `deepcopy` takes what its memo lists as already copied.
    teacher = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    return teacher.requires_grad_(False).eval()


def shared_blocks(student: LanguageModel, teacher: LanguageModel) -> int:
    """Number of blocks, from the bottom, that compute the same in both models, so that computing them once is enough.

    The embedding and these blocks must share all their tensors, frozen, and their output must not depend on training
    mode, on domains, or on state outside of these tensors.
    """
    routing = student.architecture.routing
    # Capacity differs between training and evaluation, and jitter is noise in training.
    same = isinstance(routing, LearnedConfig) and routing.capacity is None and not routing.jitter
    if not same or not student.head.is_one_matrix:
        return 0
    if routing.by_generation or not teacher.head.is_one_matrix or not _same(student.embedding, teacher.embedding):
        return 0
    # Not strict: a shallow student has fewer blocks. Never the last block: the forward pass is split before a block.
    pairs = list(zip(student.blocks, teacher.blocks, strict=False))[:-1]
    return next((i for i, (mine, theirs) in enumerate(pairs) if not _same(mine, theirs)), len(pairs))


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules share all their tensors, frozen. Empty tensors are ignored: router rows of no experts."""
    ours, others = (_tensors(module) for module in (mine, theirs))
    return ours.keys() == others.keys() and all(t is others[n] and not t.requires_grad for n, t in ours.items())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.numel()}


def distilled_rows(replayed_B: Tensor, ordinal_B: Tensor, config: DistillConfig) -> Tensor:
    """Which sequences of a batch are distilled: a pure function of each sequence's position in the stage.

    Args:
        replayed_B: True for replayed sequences, bool ``(B,)``.
        ordinal_B: Number of earlier sequences of the same kind in the stage, int64 ``(B,)``.
        config: ``text`` selects new or replayed sequences, ``fraction`` the evenly spread share of them.

    Returns:
        Their indices, int64, ascending; empty if none is distilled.
    """
    # Exact integers: with floats, rounding would move some of them. Of a fraction p / q, sequence n is distilled where
    # floor(n p / q) grows.
    share = Fraction(str(config.fraction))
    chosen_B = (ordinal_B + 1) * share.numerator // share.denominator > ordinal_B * share.numerator // share.denominator
    wanted_B = replayed_B if config.text == DistillText.replay else ~replayed_B
    return torch.nonzero(wanted_B & chosen_B).flatten()
