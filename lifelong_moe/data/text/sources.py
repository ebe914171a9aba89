"""Read the documents that a distribution's configuration names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lifelong_moe.config.data import HUB_ID, SourceConfig, patterns
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.kept import rows_sha256
from lifelong_moe.data.text.known import KnownDocuments, Summary, summary_of
from lifelong_moe.data.text.manifest import (
    PartSummary,
    SeenFile,
    SplitManifest,
    files_before,
    files_state,
    forget_split,
    hashed_file,
    split_identity,
    split_manifest,
    write_split,
)
from lifelong_moe.data.text.split import build_corpus, heldout_part
from lifelong_moe.errors import DataError
from lifelong_moe.storage.opening import open_regular

HAS_CHANGED = "a file has changed since this command began; start it again."


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
    # A dataset of the hub has no files of ours: its commit says what it holds.
    paths = [] if config.hf is not None else _paths(config, cache)
    known, mode = split_manifest(config, paths, cache)
    if known is None:
        return _read(name, config, cache, asks=within is None)

    @functools.cache
    def again() -> Corpus:
        found = _read(name, config, cache, asks=within is None)
        # Tokens and near copies are known of the text that the manifest says.
        if replace(_manifest(found, known.files), outcomes=known.outcomes) != known:
            # If the manifest is wrong, and no file has changed, the next start would end here as well.
            forget_split(config, cache)
            raise DataError(f"distributions.{name}: {HAS_CHANGED}")
        return found

    train, heldout = (Summary(part.documents, part.bytes) for part in (known.train, known.heldout))
    return Corpus(
        name,
        KnownDocuments(train, lambda: again().train),
        KnownDocuments(replace(heldout, rows=known.heldout_rows), lambda: again().heldout),
        known.train.hash,
        known.heldout.hash,
        known.duplicates,
        mode=mode,
        files=known.outcomes,
        identity=split_identity(config, known),
        state=files_state(known.files),
    )


def _paths(config: SourceConfig, cache: Path) -> list[Path]:
    """All files that a distribution leads to."""
    if config.builtin is not None:
        from lifelong_moe.data.text.builtin import builtin_path

        return [builtin_path(config.builtin, cache)]
    from lifelong_moe.data.text.files import matching_files

    named = [one for one in (config.files, config.heldout_files) if one is not None]
    return sorted({path for one in named for path in matching_files(one)})


def _read(name: str, config: SourceConfig, cache: Path, *, asks: bool) -> Corpus:
    """Read and split a distribution's documents; ``asks`` is whether the hub may be asked for them."""
    seen: dict[str, SeenFile | None] = {}
    remember_rows: list[Callable[[], None]] = []
    if config.hf is not None:
        from lifelong_moe.data.text.hub import hub_documents

        corpus = build_corpus(name, hub_documents(config, asks=asks), config, cache=cache)
    elif config.builtin is not None:
        from lifelong_moe.data.text.builtin import builtin_documents, builtin_path

        corpus = build_corpus(name, builtin_documents(config.builtin, cache), config, cache=cache)
        path = builtin_path(config.builtin, cache)
        # The text of packages is kept in a file of the cache, unless that cannot be written.
        with suppress(OSError), open_regular(path, follow=False) as file:
            seen[str(path)] = hashed_file(file)
    else:
        from lifelong_moe.data.text.file_rows import RowsCache
        from lifelong_moe.data.text.files import FilesReading, mode_of, settled

        rows = RowsCache(config, cache, files_before(config, cache))
        heldout = None if config.heldout_files is None else FilesReading(config.heldout_files, config, rows.find)
        reading = FilesReading(config.files, config, rows.find)
        corpus = build_corpus(name, reading, config, heldout, cache)
        both = [reading] if heldout is None else [reading, heldout]
        files = tuple(file for one in both for file in one.outcomes)
        corpus = replace(corpus, mode=mode_of(path for one in both for path in one.paths), files=files)
        corpus = replace(corpus, files=settled(corpus))
        seen = {path: file for one in both for path, file in one.seen.items()}
        remember_rows += [functools.partial(rows.write, one, corpus.heldout) for one in both]
    known = {path: file for path, file in seen.items() if file is not None}
    # Without a file of the cache, nothing says which text the installed packages carry.
    if len(known) < len(seen) or (not known and config.hf is None):
        return corpus
    found = _manifest(corpus, known)

    def remember() -> None:
        write_split(config, found, cache, corpus.mode)
        for one in remember_rows:
            one()

    return replace(corpus, identity=split_identity(config, found), state=files_state(known), remember=remember)


def _manifest(corpus: Corpus, seen: Mapping[str, SeenFile]) -> SplitManifest:
    train, heldout = (
        PartSummary(digest, len(part), summary_of(part).bytes)
        for digest, part in ((corpus.train_hash, corpus.train), (corpus.heldout_hash, corpus.heldout))
    )
    rows = rows_sha256(corpus.heldout)
    return SplitManifest(seen, corpus.files, train, heldout, rows, corpus.duplicates)


def heldout_documents(config: SourceConfig, within: Sequence[Path] | None = None) -> Sequence[Document] | None:
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
