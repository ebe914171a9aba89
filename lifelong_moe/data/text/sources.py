"""Read the documents that a distribution's configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lifelong_moe.config.data import HUB_ID, SourceConfig, patterns
from lifelong_moe.data.text.documents import Corpus, Document, build_corpus, heldout_part
from lifelong_moe.errors import DataError
from lifelong_moe.storage.modes import SHARED


def read_corpus(name: str, config: SourceConfig, cache: Path, within: Sequence[Path] | None = None) -> Corpus:
    """Read, check and split the documents of one distribution.

    Args:
        name: The distribution; used in messages and in the corpus.
        config: Where its documents come from.
        cache: Directory for what is expensive to extract again.
        within: Where a store, which may come from somebody else, chose the source: files elsewhere count as missing,
            and so does what the hub's cache does not hold, for no hub is asked. None where the user chose it.

    Returns:
        Documents in canonical order, train and held-out apart.

    Raises:
        DataError: Documents are missing, malformed, duplicated or too few.
    """
    if within is not None:
        _require_within(config, within)
    if config.builtin is not None:
        from lifelong_moe.data.text.builtin import builtin_documents

        return build_corpus(name, builtin_documents(config.builtin, cache), config)
    if config.files is not None:
        from lifelong_moe.data.text.files import mode_of, read_files

        heldout, theirs = (None, []) if config.heldout_files is None else read_files(config.heldout_files, config)
        documents, files = read_files(config.files, config)
        corpus = build_corpus(name, documents, config, heldout)
        mode = mode_of(config.files) & (mode_of(config.heldout_files) if config.heldout_files is not None else SHARED)
        return replace(corpus, mode=mode, files=(*files, *theirs))
    from lifelong_moe.data.text.hub import hub_documents

    return build_corpus(name, hub_documents(config, asks=within is None), config)


def heldout_documents(config: SourceConfig, within: Sequence[Path] | None = None) -> list[Document] | None:
    """Return the documents of ``heldout_files`` in order of hash; None if the key is not set.

    Raises:
        DataError: They are missing or malformed.
    """
    if config.heldout_files is None:
        return None
    if within is not None:
        _require_within(config, within)
    from lifelong_moe.data.text.files import read_documents

    return heldout_part(read_documents(config.heldout_files, config))


def lies_within(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path leads to a place below one of these folders, whatever links and ".." it holds."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


def _require_within(config: SourceConfig, folders: Sequence[Path]) -> None:
    """Require that a source is nothing but files below these folders, or a dataset of the hub.

    Raises:
        DataError: It is something else, which counts as missing.
    """
    from lifelong_moe.data.text.files import expanded, matching_files

    for pattern in (*patterns(config.files), *patterns(config.heldout_files)):
        # Before anything is listed; and then each file, since what a pattern matches may be a link.
        is_within = lies_within(Path(expanded(pattern)), folders)
        if not is_within or not all(lies_within(path, folders) for path in matching_files(pattern)):
            raise DataError(
                f"files={pattern}: not below {Path.cwd()}; what a store names elsewhere is not opened.", is_missing=True
            )
    # The library also takes folders and names of its own readers, some of which load pickles.
    if config.hf is not None and (not HUB_ID.fullmatch(config.hf) or Path(config.hf).exists()):
        raise DataError(f"hf={config.hf}: not OWNER/NAME of a dataset; a store may name no other.", is_missing=True)
