"""What was written beside what it was written from: transformers reads the folder, and both read the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel

COMPARED, GENERATED = 64, 32
"""Tokens whose logits are compared, and greedy ones that both sides write."""
LEAST_ALLOWED, ALLOWED_OF_LARGEST, LARGEST = 1e-4, 1e-5, 1e3
"""Differences of two logits in float32 that are rounding: at least this; relative to the largest logit, since rounding
grows with the numbers; and no logit counts as larger."""


def rounding(largest: float) -> float:
    """Largest difference of two logits that is rounding, where the largest logit has this size.

    Of SmolLM2's 30 layers two exact implementations differ by about 1e-4.
    """
    return max(LEAST_ALLOWED, ALLOWED_OF_LARGEST * min(largest, LARGEST))


@dataclass(frozen=True)
class Agreement:
    """How two sides compare."""

    difference: float
    """Largest of two logits, over :data:`COMPARED` tokens."""
    allowed: float
    """Largest difference that is rounding."""
    ours: list[int]
    """Greedy tokens after a prompt, until a text ends."""
    theirs: list[int]


@torch.no_grad()
def compare(model: LanguageModel, generation: int, theirs: Any, prompt_ids: Sequence[int]) -> Agreement:
    """Compare a generation of a model with what transformers reads.

    Args:
        model: In float32 on the CPU; put into evaluation mode.
        generation: Whose experts and changes all tokens use; 0 where there is no choice.
        theirs: A model of transformers, likewise.
        prompt_ids: Begin the greedy text, BOS first.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    context = model.architecture.model.context
    num_tokens = model.architecture.tokens_of(generation)
    ids_BS = torch.randint(num_tokens, (1, min(COMPARED, context)), generator=generator)
    ids_BS[0, 0] = model.architecture.bos_id

    def logits(ids_BS: Tensor) -> Tensor:
        domains_BS = torch.full_like(ids_BS, generation)
        hidden_BSD = model(TokenBatch(ids_BS, domain_ids_BS=domains_BS)).hidden_BSD
        return model.head.logits(hidden_BSD, domains_BS)[..., :num_tokens]

    ours_BSV = logits(ids_BS)
    difference = float((ours_BSV - theirs(ids_BS).logits).abs().max())
    allowed = rounding(float(ours_BSV.abs().max()))
    num = max(1, min(GENERATED, context - len(prompt_ids)))
    prompt_BS = torch.tensor([list(prompt_ids)])
    ends = theirs.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found_BS = theirs.generate(
        prompt_BS, attention_mask=torch.ones_like(prompt_BS), max_new_tokens=num, do_sample=False, pad_token_id=0
    )
    return Agreement(
        difference, allowed, _greedy(logits, prompt_BS, num, ends), found_BS[0, prompt_BS.shape[1] :].tolist()
    )


def _greedy(logits: Callable[[Tensor], Tensor], ids_BS: Tensor, num: int, ends: Sequence[int | None]) -> list[int]:
    found: list[int] = []
    # Without a cache: the other side has one, so that a fault of either shows.
    while len(found) < num and (not found or found[-1] not in ends):
        found.append(int(logits(ids_BS)[0, -1].argmax()))
        ids_BS = torch.cat([ids_BS, torch.tensor([found[-1:]])], dim=1)
    return found


@contextmanager
def read_by_transformers(folder: Path) -> Iterator[Any]:
    """A checkpoint as transformers reads it, in float32 on the CPU, while its progress bars and warnings are off.

    Raises:
        CorruptError: If it does not find each of its tensors, or finds others.
    """
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        if wrong := [f"{what}: {', '.join(map(str, names))}" for what, names in info.items() if names]:
            raise CorruptError(f"transformers reads the export otherwise than it was written ({'; '.join(wrong)}).")
        yield model.eval()
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
