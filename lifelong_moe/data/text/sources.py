"""Read the documents that a distribution's configuration names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Corpus, Document, build_corpus, heldout_part
from lifelong_moe.storage.modes import SHARED


def read_corpus(name: str, config: SourceConfig, cache: Path) -> Corpus:
    """Read, check and split the documents of one distribution.

    Args:
        name: The distribution; used in messages and in the corpus.
        config: Where its documents come from.
        cache: Directory for what is expensive to extract again.

    Returns:
        Documents in canonical order, train and held-out apart.

    Raises:
        DataError: Documents are missing, malformed, duplicated or too few.
    """
    if config.builtin is not None:
        from lifelong_moe.data.text.builtin import builtin_documents

        return build_corpus(name, builtin_documents(config.builtin, cache), config)
    if config.files is not None:
        from lifelong_moe.data.text.files import mode_of, read_documents

        heldout = None if config.heldout_files is None else read_documents(config.heldout_files, config)
        corpus = build_corpus(name, read_documents(config.files, config), config, heldout)
        mode = mode_of(config.files) & (mode_of(config.heldout_files) if config.heldout_files is not None else SHARED)
        return replace(corpus, mode=mode)
    from lifelong_moe.data.text.hub import hub_documents

    return build_corpus(name, hub_documents(config), config)


def heldout_documents(config: SourceConfig) -> list[Document] | None:
    """Return the documents of ``heldout_files`` in order of hash; None if the key is not set.

    Raises:
        DataError: They are missing or malformed.
    """
    if config.heldout_files is None:
        return None
    from lifelong_moe.data.text.files import read_documents

    return heldout_part(read_documents(config.heldout_files, config))
