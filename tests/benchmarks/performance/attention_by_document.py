"""What attention by document costs against attention with the mask: forward and backward.

    python -m tests.benchmarks.performance.attention_by_document

Prints one JSON line. Both sides take the same documents, found beforehand: a model finds them once for
all its layers.
"""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.ops.document_attention import Documents, Kernel, choose_kernel, document_attention
from tests.benchmarks.performance.clock import paired
from tests.benchmarks.performance.subjects import DEVICE, DTYPE

HEADS, KV_HEADS, WIDTH = (32, 16, 64) if DEVICE == "cuda" else (4, 2, 64)


def equal(sequences: int, length: int, documents: int) -> Tensor:
    """Documents of one length, int64 ``(B, S)``."""
    return (torch.arange(length) * documents // length).expand(sequences, -1)


def packed(sequences: int, length: int, mean: float, seed: int = 0) -> Tensor:
    """Documents of exponential length, cut where a sequence ends, int64 ``(B, S)``."""
    draw, ids, document = random.Random(seed), [], 0
    while len(ids) < sequences * length:
        ids += [document] * max(1, round(draw.expovariate(1 / mean)))
        document += 1
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


CASES = {
    "4 of 64 in 256": (equal(16, 256, 4), None),
    "8 of 128 in 1024": (equal(4, 1024, 8), None),
    "one of 256": (equal(16, 256, 1), None),
    "single tokens in 256": (equal(16, 256, 256), None),
    "4 of 4 in 16": (equal(16, 16, 4), None),
    "random, mean 64 in 256": (packed(16, 256, 64), None),
    "random, mean 200 in 256": (packed(16, 256, 200), None),
    "random, mean 128 in 1024": (packed(4, 1024, 128), None),
    "random, mean 600 in 1024": (packed(4, 1024, 600), None),
    # Whether the rule that chooses leaves much on the table.
    "random, mean 64 in 256, by length": (packed(16, 256, 64), Kernel.by_length),
    "random, mean 200 in 256, by length": (packed(16, 256, 200), Kernel.by_length),
}


def step(documents: Documents, inputs: list[Tensor], kernel: Kernel | None) -> None:
    """Forward and backward of one layer's attention."""
    query, key, value = (x.transpose(1, 2) for x in inputs)
    out = document_attention(query, key, value, documents, kernel)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def measure(rounds: int = 15) -> dict[str, Any]:
    """Time by document over time with the mask, of each case."""
    torch.set_num_threads(1)
    detail = {}
    for name, (ids, kernel) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        shapes = [(*ids.shape, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        inputs = [x.to(DEVICE, DTYPE).requires_grad_() for x in drawn]
        documents = Documents.of(ids.to(DEVICE))
        found = paired(
            lambda d=documents, x=inputs, k=kernel: step(d, x, k),
            lambda d=documents, x=inputs: step(d, x, Kernel.mask),
            rounds,
        )
        chosen = kernel or choose_kernel(inputs[0].transpose(1, 2), documents)
        shape = {"documents": len(documents.starts), "lengths": len(documents.length_counts)}
        detail[name] = {"kernel": chosen.value, **shape, **found.json()}
    return {"goals": {}, "detail": detail}


def main() -> None:
    """Print what was measured."""
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
