"""The largest numbers that a configuration may hold: far above any published system, and below what exhausts a plan.

A plan does arithmetic with these numbers, and lists layers and stages, before it can say how much memory they take. So
each is bounded where it is read, in a configuration as in a stored stage, before anything of that size exists.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lifelong_moe.errors import ConfigError

LARGEST = {
    # DeepNet (arXiv:2203.00555) has a thousand layers.
    "layers": 1_000,
    "dense_layers": 1_000,
    "context": 1 << 24,
    "batch_tokens": 1 << 30,
    # Each is a process.
    "num_workers": 1_024,
    "devices": 1_024,
    "num_nodes": 1_024,
    "expert_parallel": 1_024,
    # Rows of a matrix of draws or of features.
    "resamples": 100_000,
    "permutations": 100_000,
    "documents": 1_000_000,
    # Each is kept in memory.
    "max_bad_lines": 1_000_000,
    **dict.fromkeys(("width", "head_width", "expert_width", "dense_width", "rank", "feature_width"), 1_000_000),
    # The largest vocabulary: `lifelong_moe.config.data.MAX_VOCAB_SIZE`.
    "add": 1_000_000,
    **dict.fromkeys(("heads", "kv_heads", "experts", "shared_experts", "slots", "clusters"), 1_000_000),
}
"""By name of the key, in any section."""
LARGEST_OTHERWISE = 10**15
"""For all other keys. The largest published runs train on some 10**14 tokens."""
MOST_STAGES = 1_000
MOST_DISTRIBUTIONS = 1_000


def require_bounded(section: Any, path: str) -> None:
    """Reject a whole number of a section that is larger than any that makes sense.

    Args:
        section: A dataclass of the configuration, whose other rules need not hold yet.
        path: Its name with a dot, such as ``model.``; empty where the keys stand alone.

    Raises:
        ConfigError: Naming the key, its value and the bound.
    """
    for field in dataclasses.fields(section):
        value, most = getattr(section, field.name), LARGEST.get(field.name, LARGEST_OTHERWISE)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int) and number > most:
                raise ConfigError(f"{path}{field.name}={number} must be at most {most:,}.")
