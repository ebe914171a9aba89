"""Models of checkpoints' folders, read straight into the model's memory: nothing is held twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from io import BufferedReader

import torch
from torch import Tensor

from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.checkpoint import architecture_of, begin_unread, not_zero, pieces
from lifelong_moe.interop.layout.folder import Checkpoint, opened
from lifelong_moe.interop.layout.safetensors import Extent
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.initializers import give_memory, without_memory

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 18
"""Numbers that are converted, compared or looked at in one go."""


def load_pretrained(checkpoint: Checkpoint, stage: str = "base") -> LanguageModel:
    """Make a model of a checkpoint; all of it trains, and all experts are of the first generation.

    Args:
        checkpoint: A folder that was looked through.
        stage: Name of the stage that the experts are attributed to.

    Returns:
        On the CPU, its numbers as they are stored; where they are of several kinds, in the one that holds all.

    Raises:
        CheckpointError: A number is not finite, a tied head is not the embedding, or a file has changed meanwhile.
    """
    model = empty_model(checkpoint, stage)
    ours = model.state_dict()
    for stored, extent in checkpoint.tensors:
        with opened(extent.path) as file:
            file.seek(extent.start)
            if not stored.ours:
                unused = torch.empty(stored.shape)
                _fill(unused, file, extent, stored.name)
                if bool(unused.any()):
                    raise not_zero(extent.path, stored.name)
            for piece in pieces(stored, ours):
                _fill(piece, file, extent, stored.name)
    if checkpoint.head_copy is not None:
        _require_equal(ours["embedding.weight"].view(-1).split(CHUNK), checkpoint.head_copy)
    begin_unread(model, checkpoint.family)
    return model


def require_sound(checkpoint: Checkpoint) -> None:
    """Read all numbers once and keep none: what :func:`load_pretrained` would refuse is refused.

    Raises:
        CheckpointError: As there.
    """
    for stored, extent in checkpoint.tensors:
        for part in _numbers(extent, stored.name):
            if not stored.ours and bool(part.any()):
                raise not_zero(extent.path, stored.name)
    if checkpoint.head_copy is not None:
        embedding = next(extent for stored, extent in checkpoint.tensors if stored.ours == ("embedding.weight",))
        _require_equal(_numbers(embedding, "model.embed_tokens.weight"), checkpoint.head_copy)


def empty_model(checkpoint: Checkpoint, stage: str) -> LanguageModel:
    """The checkpoint's model, uninitialized."""
    kinds = {DTYPES[kind] for kind in checkpoint.dtypes}
    # Neither half holds the other's numbers.
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    with without_memory():
        model = LanguageModel(architecture_of(checkpoint.family, stage)).to(dtype)
    give_memory(model)
    return model


def _fill(target: Tensor, file: BufferedReader, extent: Extent, name: str) -> None:
    """Read the next numbers of a file into a contiguous tensor."""
    for part in target.view(-1).split(CHUNK):
        stored = part if part.dtype == DTYPES[extent.dtype] else torch.empty(len(part), dtype=DTYPES[extent.dtype])
        _read(stored, file, extent, name)
        if stored is not part:
            part.copy_(stored)


def _numbers(extent: Extent, name: str) -> Iterator[Tensor]:
    """The numbers of a tensor, some at a time."""
    left = math.prod(extent.shape)
    with opened(extent.path) as file:
        file.seek(extent.start)
        while left > 0:
            part = torch.empty(min(left, CHUNK), dtype=DTYPES[extent.dtype])
            _read(part, file, extent, name)
            yield part
            left -= len(part)


def _read(target: Tensor, file: BufferedReader, extent: Extent, name: str) -> None:
    # Raw bytes: NumPy has no bfloat16.
    into = target.view(torch.uint8).numpy()
    if file.readinto(into.data) != into.size:
        raise CheckpointError(f"{extent.path}: became shorter while it was read.")
    if not bool(target.isfinite().all()):
        raise CheckpointError(f"{extent.path}: {name} holds a number that is not finite.")


def _require_equal(embedding: Iterable[Tensor], extent: Extent) -> None:
    """Require that a tied head which is stored is the embedding, whose numbers come as those of ``extent`` do."""
    for part, stored in zip(embedding, _numbers(extent, "lm_head.weight"), strict=True):
        if not torch.equal(stored.float(), part.float()):
            raise CheckpointError(
                f"{extent.path}: lm_head.weight differs from model.embed_tokens.weight, although "
                f"tie_word_embeddings=True."
            )
