"""Tables from token ids to buckets, as buffers of a model: one for each number of experts that its layers have."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor

NAME = "token_buckets"
"""The table for the largest number; the others' names end in their number."""


def table_names(numbers: Iterable[int]) -> dict[int, str]:
    """The buffer's name by the number of buckets.

    A table for four made into one of three by remainders would give one bucket twice as much text as the others.

    Args:
        numbers: Experts of each layer, 0 where it is dense.
    """
    distinct = set(numbers) - {0}
    return {num: NAME if num == max(distinct) else f"{NAME}_{num}" for num in distinct}


def add_missing_tables(tensors: MutableMapping[str, Tensor], names: dict[int, str]) -> None:
    """Stages of earlier versions have one table, of which layers with fewer experts took the remainder."""
    for num, name in names.items():
        if name not in tensors and NAME in tensors:
            tensors[name] = tensors[NAME] % num
