"""Tables from token ids to buckets, as buffers of a model: one per number of experts that its layers have."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor

NAME = "token_buckets"
"""Name of the table for the largest number of experts; other tables append their number."""


def table_names(numbers: Iterable[int]) -> dict[int, str]:
    """Name of the buffer by number of buckets.

    Args:
        numbers: Experts of each layer, 0 if it is dense.
    """
    # One table each: four buckets taken modulo three would give one bucket twice as much text as the others.
    distinct = set(numbers) - {0}
    return {num: NAME if num == max(distinct) else f"{NAME}_{num}" for num in distinct}


def add_missing_tables(tensors: MutableMapping[str, Tensor], names: dict[int, str]) -> None:
    """Derive the tables that stages of earlier versions lack."""
    # They have one table, which layers with fewer experts took modulo their number.
    for num, name in names.items():
        if name not in tensors and NAME in tensors:
            tensors[name] = tensors[NAME] % num
