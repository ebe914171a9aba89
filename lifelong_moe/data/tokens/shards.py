"""Tokens on disk: written once per (documents, tokenizer), verified on opening, mapped into memory.

A part (train or held-out) is one directory ``cache/tokens/<documents16>-<tokenizer16>/`` with raw little-endian
arrays and a manifest of their sizes and hashes. A directory appears by rename, so it is whole or absent. Later there
are also notes on what was hashed, and the domains of its chunks (:mod:`lifelong_moe.clustering.chunks`).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.formats.progress import told
from lifelong_moe.data.text.documents import Corpus, Document, hash_of_hashes
from lifelong_moe.data.text.jsonl import SEPARATOR
from lifelong_moe.data.text.known import hashes_of, opened, summary_of
from lifelong_moe.data.text.spool import SpooledDocuments, chosen
from lifelong_moe.data.tokens.known_tokens import DIGEST, KnownTokens, digests_of
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import new_directory, remove_directory
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key, file_sha256
from lifelong_moe.storage.opening import open_regular
from lifelong_moe.storage.remembered import Remembered, Seen, state_of
from lifelong_moe.storage.stored import read_json

T = TypeVar("T")
# Part of each manifest: a part of another version is made again instead of read wrongly.
FORMAT_VERSION = 1
_FILES = ("tokens.bin", "offsets.bin", "text_bytes.bin")
_ANSWERS = "answer_bytes.bin"
"""There too where a document has an answer."""
_DIGESTS = "digests.bin"
"""Of each document the first half of its SHA-256; earlier versions wrote none."""
_PIECE = "piece-"
_AT_ONCE = 1 << 20
"""Bytes of tokens that are read at once."""
_MOST_OTHERS = 1000
"""Shards that are looked at for tokens of documents; pieces of 30 GB are as many."""
_VERIFIED = "verified.json"
"""Beside them, the notes on files that were hashed."""
_BATCH_BYTES = 4 << 20
"""Text encoded at a time; bounds memory."""
_BATCH_DOCUMENTS = 1 << 16
"""Most documents encoded at a time, where no text need be read to know how long it is."""
PIECE_BYTES = 32 << 20
"""Text after which tokens are kept, though the shard is not finished; of smaller text none is looked for, either."""


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """Where a shard's arrays are on disk, as they were when their hashes were compared."""

    folder: Path
    key: str
    """Hash of tokens and offsets."""
    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenShard:
    """Documents as one row of tokens; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]`` and begins with BOS."""

    tokens: np.ndarray
    """Token ids ``(num_tokens,)``, uint16 or uint32, mapped from disk and read-only."""
    offsets: np.ndarray
    """int64 ``(num_documents + 1,)``."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each source text, int64 ``(num_documents,)``; of the answer alone where there is one."""
    separator: int | None = None
    """Token between prompt and answer, where only answers count."""
    answer_bytes: np.ndarray | None = None
    """UTF-8 bytes of each text after its separator, int64 ``(num_documents,)``; None if that is not known."""
    digests: np.ndarray | None = None
    """See :data:`lifelong_moe.data.tokens.known_tokens.DIGEST`, ``(num_documents,)``; None if they are not known."""
    files: ShardFiles | None = None
    """See :attr:`kept_in`, which is asked instead."""

    @property
    def kept_in(self) -> ShardFiles | None:
        """The files that hold just these tokens and offsets; None if no files do."""
        # A part of a shard is a copy of it with other arrays, and would name the files of the whole.
        files = self.files
        is_whole = files is not None and files.tokens is self.tokens and files.offsets is self.offsets
        return files if is_whole else None

    @property
    def num_tokens(self) -> int:
        """Tokens, one BOS per document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.text_bytes)

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per token; BOS does not count, as it stands for no text."""
        return float(self.text_bytes.sum() / max(1, self.num_tokens - self.num_documents))

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of one document, BOS first."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class ShardDocuments(Sequence[np.ndarray]):
    """The documents of several shards, shard after shard; each is mapped only when it is asked for."""

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self.shards = shards
        self.ends = list(itertools.accumulate(shard.num_documents for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        # `ends` are exclusive, so the first end greater than the index names the shard.
        which = bisect.bisect_right(self.ends, index)
        return self.shards[which].document(index - (self.ends[which - 1] if which else 0))


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A distribution as tokens, with the hashes that name it."""

    name: str
    train: TokenShard
    heldout: TokenShard
    train_hash: str
    heldout_hash: str
    tokenizer_hash: str
    duplicates: int = 0
    """Documents left out because they repeat others."""
    near_copies: int = 0
    """Documents left out of training because they are near copies of held-out text."""
    split_hash: str = ""
    """See :attr:`lifelong_moe.data.text.documents.Corpus.split_hash`."""


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenizedCorpus:
    """Tokenize both parts of a corpus, or open what was tokenized before.

    Args:
        corpus: Documents in canonical order.
        tokenizer: Also decides the width of a token on disk: 2 bytes up to 65,536 entries, else 4.
        cache: ``cache/tokens/`` holds the arrays. A damaged part is made again, the other one left alone.
    """
    shards = [
        open_or_tokenize(documents, key, tokenizer, cache, corpus.mode)
        for documents, key in ((corpus.train, corpus.train_hash), (corpus.heldout, corpus.heldout_hash))
    ]
    hashes = corpus.train_hash, corpus.heldout_hash, tokenizer.hash
    counts = corpus.duplicates, len(corpus.near_copies)
    return TokenizedCorpus(corpus.name, shards[0], shards[1], *hashes, *counts, corpus.split_hash)


def tokenize_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenShard:
    """Tokenize in memory, in the order given; for text that is measured once and not kept."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    rows = [
        np.array([tokenizer.bos_id, *ids], dtype=dtype)
        for batch in _batches(documents)
        for ids in tokenizer.encode_batch([document.text for document in batch])
    ]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    text_bytes = np.array([document.num_bytes for document in documents], dtype=np.int64)
    return TokenShard(tokens=np.concatenate(rows), offsets=offsets, text_bytes=text_bytes)


def open_or_tokenize(
    documents: Sequence[Document], key: str, tokenizer: Tokenizer, cache: Path, mode: int
) -> TokenShard:
    """Tokenize one part of a corpus, or open what was tokenized before.

    Args:
        documents: In canonical order.
        key: The hash of its documents.
        tokenizer: See :func:`tokenize_corpus`.
        cache: See :func:`tokenize_corpus`.
        mode: Permissions of the arrays, from which the text can be had again.
    """
    directory = cache / "tokens" / f"{key[:SHORT]}-{tokenizer.tokens_hash[:SHORT]}"
    shard = _open(directory, tokenizer.vocab_size)
    if shard is None:
        _build(documents, directory, tokenizer, mode)
        shard = _open(directory, tokenizer.vocab_size)
        if shard is None:
            raise OSError(f"{directory}: what was written a moment ago does not verify")
    # Garbage collection removes parts that nobody opened for long. Another user's cache cannot be touched.
    with suppress(OSError):
        os.utime(directory / "manifest.json")
    return shard


def _open(directory: Path, vocab_size: int) -> TokenShard | None:
    """Map a part into memory if its manifest verifies, and if its numbers are those of tokens."""
    manifest = _read_manifest(directory)
    if manifest is None:
        return None
    names = [name for name in (*_FILES, _ANSWERS, _DIGESTS) if name in manifest["files"]]
    notes = Remembered(directory / _VERIFIED)
    with ExitStack() as stack:
        files, are_known = dict[str, BufferedReader](), True
        for name in names:
            entry = manifest["files"][name]
            try:
                # Opened once: what is hashed is what is mapped.
                file = stack.enter_context(open_regular(directory / name, follow=False))
            except OSError:
                return None
            # Size before hash: a truncated file is rejected without reading gigabytes.
            seen = Seen(state_of(file), entry["sha256"])
            if seen.state[2] != entry["size"]:
                return None
            if not notes.knows(name, seen):
                if _sha256(file) != entry["sha256"]:
                    return None
                are_known = False
                notes.note(name, seen)
            files[name] = file
        tokens, offsets, text_bytes = (files[name] for name in _FILES)
        try:
            mapped: np.memmap[Any, Any] = np.memmap(tokens, dtype=manifest["dtype"], mode="r")
            # NumPy does not know it, having been given an open file; a process that trains maps the same one.
            mapped.filename = str((directory / _FILES[0]).absolute())
            # Only tokens are mapped, which may exceed memory; the other arrays have one number per document.
            borders = np.fromfile(offsets, dtype="<i8")
            hashes = {name: manifest["files"][name]["sha256"] for name in _FILES[:2]}
            shard = TokenShard(
                tokens=mapped,
                offsets=borders,
                text_bytes=np.fromfile(text_bytes, dtype="<i8"),
                answer_bytes=np.fromfile(files[_ANSWERS], dtype="<i8") if _ANSWERS in files else None,
                digests=np.memmap(files[_DIGESTS], dtype=DIGEST, mode="r") if _DIGESTS in files else None,
                files=ShardFiles(
                    directory, content_key({"dtype": manifest["dtype"], "files": hashes}), mapped, borders
                ),
            )
        except ValueError:  # no whole number of tokens, or none
            return None
        if not are_known and not (_is_consistent(shard) and _largest(tokens, manifest["dtype"]) < vocab_size):
            return None
    notes.save()
    return shard


def _sha256(file: BufferedReader) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _is_consistent(shard: TokenShard) -> bool:
    """Whether documents lie one after the other, so that no border leads elsewhere."""
    offsets = shard.offsets
    if len(offsets) != shard.num_documents + 1 or offsets[0] != 0 or offsets[-1] != shard.num_tokens:
        return False
    if any(one is not None and len(one) != shard.num_documents for one in (shard.answer_bytes, shard.digests)):
        return False
    return bool((np.diff(offsets) > 0).all())


def _largest(file: BufferedReader, dtype: str) -> int:
    """The largest token of a file."""
    file.seek(0)
    # Not of the map, which would take as much memory as there are tokens.
    return max(int(np.frombuffer(part, dtype).max()) for part in iter(partial(file.read, _AT_ONCE), b""))


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(directory / "manifest.json")
        # The dtype is passed to NumPy, so only the two that are written are accepted.
        if manifest["version"] != FORMAT_VERSION or manifest["dtype"] not in ("<u2", "<u4"):
            return None
        files = manifest["files"]
        if any(set(files[name]) != {"size", "sha256"} for name in {*_FILES, *files.keys()}):
            return None
    # Missing or damaged is the same: a cache is made again and never an error.
    except (OSError, CorruptError, KeyError, TypeError):
        return None
    return dict(manifest)


def _build(documents: Sequence[Document], directory: Path, tokenizer: Tokenizer, mode: int) -> None:
    known, pieces = KnownTokens(), list[Path]()
    is_large = summary_of(documents).bytes >= PIECE_BYTES
    if is_large:
        for other, shard in _others(directory, tokenizer.vocab_size):
            assert shard.digests is not None
            known.add(shard.digests, shard.tokens, shard.offsets)
            pieces += [other] if other.name.startswith(_PIECE) else []
    with new_directory(directory, mode) as work:
        # Little-endian by name, so that a cache can be copied between machines.
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        parent = directory.parent if is_large else None
        made = _Pieces(parent, tokenizer, dtype, mode)
        _write_arrays(documents, work, tokenizer, dtype, known, made)
        _write_manifest(work, dtype)
        if directory.exists() and _open(directory, tokenizer.vocab_size) is None:
            # Damaged. A whole one was written meanwhile by another process, and is kept.
            remove_directory(directory)
    for piece in (*pieces, *made.written):
        # Another process may be done with it, too.
        with suppress(OSError):
            remove_directory(piece)


def _write_manifest(work: Path, dtype: str) -> None:
    names = sorted(path.name for path in work.iterdir())
    files = {name: {"size": (work / name).stat().st_size, "sha256": file_sha256(work / name)} for name in names}
    manifest = canonical_json({"version": FORMAT_VERSION, "dtype": dtype, "files": files})
    (work / "manifest.json").write_text(manifest, encoding="utf-8")


def _others(directory: Path, vocab_size: int) -> Iterator[tuple[Path, TokenShard]]:
    """Further text that the same tokenizer cut, the newest first, and its pieces."""
    suffix = directory.name.rpartition("-")[2]
    found: list[tuple[float, Path]] = []
    for path in directory.parent.glob(f"*-{suffix}"):
        # Removed by now, perhaps.
        with suppress(OSError):
            found.append((-(path / "manifest.json").stat().st_mtime, path))
    for _, path in sorted(found)[:_MOST_OTHERS]:
        if path != directory and (shard := _open(path, vocab_size)) is not None and shard.digests is not None:
            yield path, shard


class _Pieces:
    """Keeps new tokens as they are made, a piece after the other, so that a killed process need not make them again."""

    def __init__(self, parent: Path | None, tokenizer: Tokenizer, dtype: str, mode: int) -> None:
        self._parent, self._dtype, self._mode = parent, dtype, mode
        self._suffix = tokenizer.tokens_hash[:SHORT]
        self._rows, self._arrays, self._hashes, self._num_bytes = list[bytes](), _Arrays(), list[str](), 0
        self.written: list[Path] = []

    def add(self, documents: Sequence[Document], rows: list[bytes]) -> None:
        """Add documents and the tokens of each, in order of hash; no text of a spool is read."""
        if self._parent is None:
            return
        self._rows += rows
        self._arrays.add(documents)
        self._hashes += hashes_of(documents)
        self._num_bytes += summary_of(documents).bytes
        if self._num_bytes >= PIECE_BYTES:
            self._write(self._parent)
            self._rows, self._arrays, self._hashes, self._num_bytes = [], _Arrays(), [], 0

    def _write(self, parent: Path) -> None:
        path = parent / f"{_PIECE}{hash_of_hashes(self._hashes)[:SHORT]}-{self._suffix}"
        with new_directory(path, self._mode) as work:
            width = int(self._dtype[-1])
            self._arrays.lengths.extend(len(row) // width for row in self._rows)
            (work / _FILES[0]).write_bytes(b"".join(self._rows))
            self._arrays.write(work)
            _write_manifest(work, self._dtype)
        self.written.append(path)


class _Arrays:
    """The numbers of each document."""

    def __init__(self) -> None:
        # A number takes eight bytes here, four times as much in a list.
        self.lengths, self.text_bytes, self.answer_bytes = array("q"), array("q"), array("q")
        self.digests = bytearray()

    def add(self, documents: Sequence[Document]) -> None:
        """Add all but the lengths in tokens; no text of a spool is read."""
        if isinstance(documents, SpooledDocuments):
            self.text_bytes.extend(documents.num_bytes.tolist())
            self.answer_bytes.extend(documents.answer_bytes.tolist())
        else:
            self.text_bytes.extend(document.num_bytes for document in documents)
            self.answer_bytes.extend(len(document.text.partition(SEPARATOR)[2].encode()) for document in documents)
        self.digests += digests_of(documents).tobytes()

    def write(self, work: Path) -> None:
        """Write them beside the tokens."""
        (work / "offsets.bin").write_bytes(np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8").tobytes())
        (work / "text_bytes.bin").write_bytes(np.array(self.text_bytes, dtype="<i8").tobytes())
        if any(self.answer_bytes):
            (work / _ANSWERS).write_bytes(np.array(self.answer_bytes, dtype="<i8").tobytes())
        (work / _DIGESTS).write_bytes(self.digests)


def _write_arrays(
    documents: Sequence[Document],
    work: Path,
    tokenizer: Tokenizer,
    dtype: str,
    known: KnownTokens | None = None,
    pieces: _Pieces | None = None,
) -> None:
    """Write tokens and numbers.

    Args:
        documents: In canonical order.
        work: Folder of the arrays.
        tokenizer: See :func:`tokenize_corpus`.
        dtype: Of a token.
        known: Documents that need not be tokenized.
        pieces: Keeps the others as they are made.
    """
    arrays = _Arrays()
    # Written batch by batch: the tokens of a large distribution need not fit into memory.
    with (work / "tokens.bin").open("wb") as stream:
        size = summary_of(documents).bytes
        batches = told(_batches(documents), "tokenizing", size, lambda batch: summary_of(batch).bytes)
        for batch, new, rows in _rows_of(batches, tokenizer, dtype, known):
            if pieces is not None:
                pieces.add(chosen(batch, new), [row for row, is_new in zip(rows, new.tolist(), strict=True) if is_new])
            # Not `tofile`, whose errors give no reason, such as a full disk.
            stream.writelines(rows)
            arrays.lengths.extend(len(row) // int(dtype[-1]) for row in rows)
            arrays.add(batch)
    arrays.write(work)


def _rows_of(
    batches: Iterable[Sequence[Document]], tokenizer: Tokenizer, dtype: str, known: KnownTokens | None
) -> Iterator[tuple[Sequence[Document], NDArray[np.bool_], list[bytes]]]:
    """Yield each batch, which of its documents are new, and the tokens of each as bytes."""

    def encoded(texts: list[str]) -> list[bytes]:
        each = tokenizer.encode_batch(texts)
        return [np.array([tokenizer.bos_id, *ids], dtype=dtype).tobytes() for ids in each]

    # The library uses all processors while it is at work. So that it mostly is, a batch is read, and the one before it
    # written, at the same time.
    with ThreadPoolExecutor(1, "tokenizing") as encoder:

        def begun(batch: Sequence[Document]) -> tuple[Sequence[Document], list[bytes | None], Future[list[bytes]]]:
            tokens = known.find(digests_of(batch)) if known is not None else [None] * len(batch)
            rows = [None if one is None else one.astype(dtype).tobytes() for one in tokens]
            # Of documents whose tokens are known no text is read.
            new = chosen(batch, np.array([row is None for row in rows]))
            return batch, rows, encoder.submit(encoded, [document.text for document in new])

        for batch, rows, job in _one_ahead(map(begun, batches)):
            new = iter(job.result())
            is_new = np.array([row is None for row in rows])
            yield batch, is_new, [next(new) if row is None else row for row in rows]


def _one_ahead(things: Iterable[T]) -> Iterator[T]:
    """Yield each once the next one is there."""
    before = list[T]()
    for thing in things:
        yield from before
        before = [thing]
    yield from before


def _batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            part = documents[start : start + _BATCH_DOCUMENTS]
            assert isinstance(part, SpooledDocuments)
            numbers = np.cumsum(part.num_bytes) // _BATCH_BYTES
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(part)]
            yield from (part[begin:end] for begin, end in itertools.pairwise(edges))
        return
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
