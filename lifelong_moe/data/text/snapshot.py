"""Files of a model on the Hugging Face hub, at a fixed commit, or from its local cache when offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from lifelong_moe.data.text.hub import Asked, failures_told


def snapshot(
    name: str, revision: str, small: Collection[str], large: Callable[[Path], Collection[str]], *, asks: bool = True
) -> Path:
    """Download a model's files, or find them in the cache; others of the repository are left there.

    Args:
        name: ``OWNER/NAME``.
        revision: A commit. Once its files are in the cache, nothing is asked of the hub.
        small: Names of files that are wanted if they are there.
        large: Names of further ones, from the folder of the small ones.
        asks: Whether the hub may be asked; otherwise only its cache is read, and nothing is sent.

    Returns:
        The commit's folder in the cache, whose files are links into the cache.

    Raises:
        DataError: The model cannot be had: unknown, gated, or not in the cache while offline.
        ResourceError: The disk is full.
        TryAgainError: The hub cannot be reached, or asks to come back later.
    """
    # A bar shows remote names, and redraws its line by control characters that our streams do not obey.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # attempts are no news, and the last one is told below
    # Here, since importing it takes time and only models of the hub need it.
    import huggingface_hub
    from huggingface_hub import constants

    def fetch(names: Collection[str]) -> Path:
        # Names, not patterns, whoever made them.
        patterns = ["".join(f"[{char}]" if char in "*?[" else char for char in one) for one in names]
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=not asks
        )
        return Path(found)

    asked = Asked(f"model.from={name}@{revision[:8]}", "the model", "models", asks, "HF_HUB_OFFLINE")
    with failures_told(asked, lambda: constants.HF_HUB_OFFLINE):
        folder = fetch(small)
        return fetch(large(folder))
