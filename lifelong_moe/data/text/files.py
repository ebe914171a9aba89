"""A user's own files, named by paths or globs: JSONL and Parquet, and texts of which each file is a document.

A malformed JSONL or Parquet file is a mistake. Text that people have lying about is of many kinds: what a glob matches
besides text, or in an encoding that nobody stated, is left out, counted and named; only a file that is named by itself
must be text.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lifelong_moe.config.data import SourceConfig, patterns
from lifelong_moe.data.formats.compression import COMPRESSED
from lifelong_moe.data.formats.encodings import UTF8, declared_by, decoded
from lifelong_moe.data.formats.globs import matching
from lifelong_moe.data.formats.html import text_of_html
from lifelong_moe.data.formats.limits import MAX_HTML_BYTES, MAX_SOURCE_FILES, MAX_TEXT_FILE_BYTES, Quota
from lifelong_moe.data.formats.outcomes import FileOutcome, LeftOutError, Outcome, sentence
from lifelong_moe.data.formats.progress import told
from lifelong_moe.data.formats.streams import OpenFile, check_text, open_file, read_bytes, refuse_pickled
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.jsonl import own_unit, read_jsonl
from lifelong_moe.data.text.known import opened
from lifelong_moe.data.text.manifest import SeenFile, read_file, seen_unread, unread_file
from lifelong_moe.data.text.parquet import read_parquet
from lifelong_moe.data.text.spool import KnownFile, SpooledDocuments
from lifelong_moe.errors import DataError
from lifelong_moe.storage.modes import SHARED, as_private_as
from lifelong_moe.storage.opening import kind_of

PROSE = (".txt", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
HTML = (".html", ".htm", ".xhtml")
SOURCE = (
    *(".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh", ".mm"),
    *(".java", ".kt", ".kts", ".scala", ".groovy", ".cs", ".fs", ".vb", ".go", ".rs", ".zig", ".swift", ".nim", ".js"),
    *(".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".vue", ".svelte", ".css", ".scss", ".php", ".pl", ".pm", ".rb", ".lua"),
    *(".tcl", ".r", ".jl", ".f90", ".f95", ".ada", ".pas", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".sql", ".hs"),
    *(".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".cljs", ".lisp", ".el", ".scm", ".rkt", ".asm", ".vhd", ".proto"),
    *(".cmake"),
)
"""Endings of source code, which is read as it is."""
READABLE = ".jsonl, .txt, .md, .rst, .html, source code such as .py (all also .gz or .zst) and .parquet"
Reader = Callable[[OpenFile, SourceConfig], Iterator[Document]]


def read_documents(named: Any, config: SourceConfig) -> list[Document]:
    """The documents alone of :func:`read_files`."""
    return read_files(named, config)[0]


def read_files(named: Any, config: SourceConfig) -> tuple[list[Document], list[FileOutcome]]:
    """All documents of the files that match, and what became of each file; see :class:`FilesReading`."""
    reading = FilesReading(named, config)
    return [one for one in reading if isinstance(one, Document)], reading.outcomes


@dataclass(frozen=True)
class ReadNow:
    """A file that was read."""

    outcome: FileOutcome
    held_bytes: int
    """Counted against the limits for files that are read together."""
    excess_bytes: int
    """See :attr:`lifelong_moe.data.formats.limits.Quota.excess_bytes`."""


class ReadBefore(KnownFile, Protocol):
    """A file that was read before, with the same bytes and settings."""

    @property
    def seen(self) -> SeenFile:
        """The file as it is now."""

    @property
    def read(self) -> ReadNow:
        """What became of it."""


class FilesReading(Iterable[Document | KnownFile]):
    """The documents of the files that match, read one after the other; afterwards, what became of each file.

    Args:
        named: Paths or globs, as of ``files``, relative to the current directory; ``**`` crosses folders.
        config: ``text_field``, ``source_field``, ``encoding`` and ``min_chars``.
        known: Finds what is known of an open file, in place of its documents; None reads all.

    Raises:
        DataError: Nothing matches. While reading: nothing that matches gives a document, a file that is named by itself
            is no text, or ``file:line: reason``.
    """

    def __init__(self, named: Any, config: SourceConfig, known: Callable[[OpenFile], ReadBefore | None] | None = None):
        self._named, self._config, self._known = named, config, known
        self.new: dict[str, ReadNow] = {}
        """The files that were read and not left out, by name, and what to remember of them."""
        self._alone = {Path(one) for one in map(expanded, patterns(named)) if os.path.lexists(one)}
        self.paths = matching_files(named)
        self._outcomes = _passed_over(self.paths, self._alone)
        self.seen: dict[str, SeenFile | None] = {
            file.file: seen_unread(Path(file.file), is_whole=True) for file in self._outcomes
        }
        """The files as they were when they were read; None of one that changed meanwhile."""
        # Every file's kind is checked before the first is read, which may take minutes.
        self._readers = [
            (path, _reader_or_none(path, is_alone=path in self._alone))
            for path in self.paths
            if str(path) not in self.seen
        ]

    @property
    def outcomes(self) -> list[FileOutcome]:
        """What became of each file, in order of name."""
        return sorted(self._outcomes, key=lambda file: Path(file.file))

    def __iter__(self) -> Iterator[Document | KnownFile]:
        # One quota for all of them: many small files are as much as a large one.
        quota, number = Quota(), 0
        each = (one for path, reader in self._readers for one in self._documents(path, reader, quota))
        size = sum(_size(path) for path, _ in self._readers)
        for one in told(each, f"reading {patterns(self._named)[0]}", size, lambda one: one.num_bytes):
            number += 1
            yield one
        if not number:
            raise DataError(
                f"files={', '.join(patterns(self._named))}: there are no documents in its {len(self.paths)} file(s). "
                f"{sentence(self._outcomes)}."
            )

    def _documents(self, path: Path, reader: Reader | None, quota: Quota) -> Iterator[Document | KnownFile]:
        if reader is None:
            self.seen[str(path)] = seen_unread(path, is_whole=False)
            self._outcomes.append(FileOutcome(str(path), Outcome.unknown))
            return
        found = long = 0
        with open_file(path, quota) as file:
            if self._known is not None and (known := self._known(file)) is not None:
                self.seen[str(path)] = known.seen
                self._outcomes.append(known.read.outcome)
                quota.excess_bytes += known.read.excess_bytes
                file.portion.take(0)
                file.portion.hold(known.read.held_bytes)
                if known.read.outcome.documents:
                    yield known
                return
            before, counted = unread_file(file.data), (quota.num_bytes, quota.excess_bytes)
            try:
                for document in reader(file, self._config):
                    found += 1
                    if len(document.text.strip()) >= self._config.min_chars:
                        long += 1
                        yield document
                outcome, note = Outcome.used if long else Outcome.too_short if found else Outcome.empty, ""
            except LeftOutError as error:
                if path in self._alone:
                    raise
                outcome, note = error.outcome, str(error)
            self.seen[str(path)] = read_file(file.data, before)
        self._outcomes.append(FileOutcome(str(path), outcome, long, note or "; ".join(file.notes)))
        counted = quota.num_bytes - counted[0], quota.excess_bytes - counted[1]
        # What a glob leaves out is a mistake where it is named by itself.
        if not note:
            self.new[str(path)] = ReadNow(self._outcomes[-1], *counted)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _passed_over(paths: Sequence[Path], alone: Set[Path]) -> list[FileOutcome]:
    """What is not opened: what a glob found that is no file, and files that are found by another path too.

    A link to a folder above itself leads to each file some forty times. Of the paths of one file the one that is named
    by itself is read, or else the one through the fewest folders, the first by name.
    """
    found: list[FileOutcome] = []
    first: dict[str, Path] = {}
    for path in sorted(paths, key=lambda one: (one not in alone, len(one.parts), one)):
        if path not in alone and (reason := _no_file(path)) is not None:
            found.append(FileOutcome(str(path), Outcome.unknown, note=reason))
        elif (other := first.setdefault(os.path.realpath(path), path)) != path:
            found.append(FileOutcome(str(path), Outcome.duplicate, note=f"the same file as {other}"))
    return found


def _no_file(path: Path) -> str | None:
    """Why nothing can be read there; None for a file, and for what only opening it tells, such as permissions."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link that leads nowhere" if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink() else None
    return None if stat.S_ISREG(mode) else kind_of(mode)


def settled(corpus: Corpus) -> tuple[FileOutcome, ...]:
    """What became of a corpus's files, now that duplicates, near copies and what is too much are left out of it."""
    files = {file.file: file for file in corpus.files}
    kept = _files_of(corpus.train, files) | _files_of(corpus.heldout, files)
    why = dict.fromkeys(corpus.beyond, Outcome.beyond)
    why |= dict.fromkeys(_files_of(corpus.near_copies, files), Outcome.near_copy)

    def now(file: FileOutcome) -> FileOutcome:
        if file.outcome != Outcome.used or file.file in kept:
            return file
        return replace(file, outcome=why.get(file.file, Outcome.duplicate))

    return tuple(map(now, files.values()))


def _files_of(documents: Sequence[Document], files: Mapping[str, FileOutcome]) -> set[str]:
    """The files of some documents."""
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        return set(documents.files)
    return {_file_of(document.origin, files) for document in documents}


def _file_of(origin: str, files: Mapping[str, FileOutcome]) -> str:
    """The file of a document, whose origin is the file or a line in it."""
    return origin if origin in files else origin.rpartition(":")[0]


def matching_files(named: Any) -> list[Path]:
    """Return what paths or globs name, each once, in order of name. Folders that a glob also matches are passed over.

    Raises:
        DataError: Nothing matches one of them, or only folders do, or they are too many.
    """
    # The order of a single pattern's files is that of earlier versions.
    each = [_matching(pattern) for pattern in patterns(named)]
    found = each[0] if len(each) == 1 else sorted(set().union(*each))
    if len(found) > MAX_SOURCE_FILES:
        raise DataError(f"files={named}: {len(found):,} files; there may be at most {MAX_SOURCE_FILES:,}.")
    return found


def _matching(pattern: str) -> list[Path]:
    pattern = expanded(pattern)
    try:
        # First as a plain path: a file's own name may hold `[` or `*`.
        if Path(pattern).exists():
            found = [Path(pattern)]
        else:
            # A path can come twice, and glob's order is the file system's.
            names = itertools.islice(matching(pattern), 2 * MAX_SOURCE_FILES)
            found = sorted({Path(name) for name in names})
    # Too long a name, or one that holds NUL.
    except (OSError, ValueError) as error:
        raise DataError(f"files={pattern}: {error}.") from None
    if not found:
        reason = f"files={pattern}: no such file, and nothing matches it under {Path.cwd()}."
        raise DataError(reason, is_missing=True)
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise DataError(f"files={pattern}: is a directory; name its files, e.g. {found[0] / '**' / '*.jsonl'}.")
    return files


def expanded(pattern: str) -> str:
    """A path or glob with the home directory in place of ``~``, unless a file is called so."""
    return pattern if not pattern.startswith("~") or _exists(pattern) else os.path.expanduser(pattern)


def _exists(pattern: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(pattern).exists()
    return False


def mode_of(paths: Iterable[Path]) -> int:
    """Permissions of copies of text of files: as private as each of them."""
    mode = SHARED
    for path in paths:
        # A file that has gone meanwhile is no one's text; whoever reads it says so.
        with suppress(OSError):
            mode &= as_private_as(path.stat().st_mode)
    return mode


def reader_of(path: Path) -> Reader:
    """Choose how a file is read by its extension, before anything is opened.

    Raises:
        DataError: Its kind is unknown, or can run code when loaded.
    """
    packed = path.suffix.lower() in COMPRESSED
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind == ".jsonl":
        return _jsonl_documents
    if kind in HTML:
        return _html_documents
    if kind in PROSE or kind in SOURCE:
        return _text_documents
    if kind == ".parquet" and not packed:
        return _parquet_documents
    refuse_pickled(path)
    raise DataError(f"{path}: unknown kind of file; {READABLE} are read.")


def _jsonl_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    return read_jsonl(file, config.text_field, config.source_field, config.answer_field)


def _text_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    """Yield a text file as one document, which is its own source unit."""
    text = _text(file, _content(file, MAX_TEXT_FILE_BYTES), config.encoding)
    yield Document(text, own_unit(text), str(file.path))


def _html_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    """Yield a page's text as one document."""
    data = _content(file, MAX_HTML_BYTES)
    page = _text(file, data, config.encoding or declared_by(data))
    if text := text_of_html(page):
        yield Document(text, own_unit(text), str(file.path))
    else:
        raise LeftOutError(f"{file.path}: there is no text on the page.", Outcome.empty)


def _content(file: OpenFile, most_bytes: int) -> bytes:
    if (data := read_bytes(file, most_bytes)) is None:
        reason = f"{file.path}: one document of more than {most_bytes >> 20} MiB; cut it, or use .jsonl."
        raise LeftOutError(reason, Outcome.too_long)
    return data


def _text(file: OpenFile, data: bytes, otherwise: str | None) -> str:
    """Decode a file, and note an encoding that its reader may not expect."""
    where = str(file.path)
    text, encoding = decoded(data, where, otherwise)
    if not text.strip():
        raise LeftOutError(f"{where}: the text is blank.", Outcome.empty)
    try:
        text = check_text(text, where)
    except DataError as error:
        raise LeftOutError(str(error), Outcome.binary) from None
    if encoding != UTF8:
        file.notes.append(f"read as {encoding}")
    return text


def _parquet_documents(file: OpenFile, config: SourceConfig) -> Iterator[Document]:
    return read_parquet(file, config.text_field, config.source_field, config.answer_field)


def _reader_or_none(path: Path, *, is_alone: bool) -> Reader | None:
    """How a file is read; None if it is of another kind and was found with others."""
    try:
        return reader_of(path)
    except DataError:
        if is_alone:
            raise
        return None
