"""Byte-level BPE with one special token, trained once and then fixed for good."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.config.data import MAX_VOCAB_SIZE, TokenizerConfig
from lifelong_moe.data.formats.streams import decode, open_file, read_whole, refuse_pickled
from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.known import summary_of, told_of
from lifelong_moe.data.tokens.components import MAX_TOKEN_BYTES, require_bounded
from lifelong_moe.errors import ConfigError, CorruptError, DataError, LifelongError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key, text_sha256
from lifelong_moe.storage.modes import SHARED
from lifelong_moe.storage.opening import read_bounded

if TYPE_CHECKING:
    import tokenizers

BOS = "<|bos|>"
"""Begins every document and so separates them; the only special token, id 0."""
KNOWN_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[BOS]", "<bos>")
"""What a given tokenizer may call its document separator, in order of preference."""
MAX_TOKENIZER_BYTES = 64 << 20
"""Longest ``tokenizer.json``; the largest published ones have 35 MB."""
RECIPE_VERSION = 1
"""Raised whenever the same text would yield another tokenizer."""
SAMPLE_BYTES = 200_000_000
"""Most text that a tokenizer is trained on. More takes longer and hardly changes which pairs are frequent."""


_PROBE = "A tokenizer must give back {every: character};\n\tgrüße, naïve, 漢字, λx.x+1, 🙂 0123456789!"
"""What a given tokenizer is asked to encode and decode without loss."""
_FAILS = "tokenizer: it fails on this text"


class Tokenizer:
    """Text to token ids and back. Immutable; two with equal ``hash`` are equal."""

    def __init__(self, backend: tokenizers.Tokenizer, text: str | None = None, bos: str | int | None = None) -> None:
        """Wrap a ``tokenizers.Tokenizer``.

        Args:
            backend: The tokenizer.
            text: Canonical JSON of what it was built from, if any. The hash is of this text and not of how the
                installed version of ``tokenizers`` would write it, so an upgrade changes no stage key.
            bos: The special token that begins a document, by name or id; by default the first of ``KNOWN_BOS``.

        Raises:
            ConfigError: It has no special token that can begin a document, or text could forge that token.
        """
        self._text = canonical_json(json.loads(backend.to_str())) if text is None else text
        self._hash = text_sha256(self._text)
        # A special token's name within a text is text like any other; only we place the real one.
        backend.encode_special_tokens = True
        # A given file may ask for truncation or padding, which would lose text or add tokens.
        backend.no_truncation()
        backend.no_padding()
        # Nor its post-processor, which adds the special tokens that we place ourselves, and may repeat the text.
        backend.post_processor = None
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # Not the number of entries: ids of a given tokenizer may have gaps, and the embedding is indexed by id.
        self._vocab_size = max(vocabulary.values()) + 1
        self._num_tokens = len(vocabulary)
        self._longest_token_bytes = max(len(token.encode("utf-8")) for token in vocabulary)
        if self._vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(f"tokenizer: token ids reach {self._vocab_size - 1}; at most {MAX_VOCAB_SIZE:,} entries.")
        if self._longest_token_bytes > MAX_TOKEN_BYTES:
            raise ConfigError(
                f"tokenizer: a token of {self._longest_token_bytes:,} bytes; at most {MAX_TOKEN_BYTES:,}."
            )
        added = self._backend.get_added_tokens_decoder().items()
        special = {token.content: index for index, token in added if token.special}
        usual = next((name for name in KNOWN_BOS if name in special), None)
        # By name, which two ids cannot share.
        given = next((name for name, index in special.items() if bos in (name, index)), None)
        if bos is not None and given is None:
            raise ConfigError(f"tokenizer.bos={bos} is no special token; there are {_listed(special)}.")
        if (name := given or usual) is None:
            raise ConfigError(
                f"tokenizer: no special token that can begin a document; needs one of {', '.join(KNOWN_BOS)}, "
                f"has {_listed(special)}."
            )
        # Else a document that contains the name could forge a document border.
        if special[name] in self.encode(name):
            raise ConfigError(f"tokenizer: the text {name} encodes as the special token {name}; it must not.")
        self._bos_name, self._bos_id = name, special[name]
        # Of what begins documents in another way, other tokens are on disk.
        self._tokens_hash = self._hash if name == usual else text_sha256(f"{self._hash} {name}")

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1, special tokens included."""
        return self._vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens that there are, special ones included; fewer than ``vocab_size`` where ids have gaps."""
        return self._num_tokens

    @property
    def longest_token_bytes(self) -> int:
        """UTF-8 bytes of the longest token: an upper bound of the text that one token represents."""
        return self._longest_token_bytes

    @property
    def bos_id(self) -> int:
        """Id of the token that begins every document."""
        return self._bos_id

    @property
    def bos_name(self) -> str:
        """What its file calls that token."""
        return self._bos_name

    @property
    def text(self) -> str:
        """Its ``tokenizer.json``."""
        return self._text

    @cached_property
    def adds_bos(self) -> bool:
        """Whether others who read the file, once it is exported, put BOS before a text by themselves.

        One that does not say what stands around a text is exported so that they do.
        """
        if json.loads(self._text).get("post_processor") is None:
            return True
        with _failures_told(_FAILS):
            # Around no text there are special tokens alone.
            around = type(self._backend).from_str(self._text).encode("").ids
        return bool(around[:1] == [self._bos_id])

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON text, which is also what ``save`` writes."""
        return self._hash

    @property
    def tokens_hash(self) -> str:
        """Names tokens that it made: :attr:`hash`, unless another token than the usual one begins documents."""
        return self._tokens_hash

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without adding any special token; special-token strings in them are plain text."""
        with _failures_told(_FAILS):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Encode one text; see ``encode_batch``."""
        return self.encode_batch([text])[0]

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[int | None]]]:
        """Encode texts; with each token comes the number of its word in the text, beyond which nothing is merged."""
        with _failures_told(_FAILS):
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.word_ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, leaving out document separators."""
        # Left out by id and not by `skip_special_tokens`, which would drop a given tokenizer's other tokens too.
        kept = [int(index) for index in ids if int(index) != self._bos_id]
        with _failures_told(_FAILS):
            return str(self._backend.decode(kept, skip_special_tokens=False))

    def name(self, token_id: int) -> str:
        """Return a token's text; BOS, which stands for no text, by its name."""
        return BOS if token_id == self._bos_id else self.decode([token_id])

    def save(self, path: Path, mode: int = SHARED) -> None:
        """Write ``tokenizer.json`` atomically, with permissions ``mode``; ``tokenizers`` and transformers read it."""
        write_atomic(Path(path), self._text, mode)

    @classmethod
    def load(cls, path: Path, bos: str | None = None) -> Tokenizer:
        """Read a ``tokenizer.json``, ours or a given one; ``bos`` as for the constructor.

        Raises:
            ConfigError: The file is missing, is no tokenizer, loses text, or has no token that can begin a document.
        """
        try:
            text = _read_text(Path(path))
        except DataError as error:
            raise ConfigError(f"tokenizer.file={error}") from error
        try:
            tokenizer = cls.from_text(text, bos)
        except ConfigError as error:
            raise ConfigError(f"tokenizer.file={path}: {error}") from error
        decoded = tokenizer.decode(tokenizer.encode(_PROBE))
        # Some tokenizers put a space before the text, which loses nothing.
        if decoded.strip() != _PROBE:
            raise ConfigError(
                f"tokenizer.file={path}: loses text ({_PROBE!r} comes back as {decoded!r}), so bits per byte would "
                f"mean nothing; it needs a byte-level alphabet or byte fallback."
            )
        return tokenizer

    @classmethod
    def from_text(cls, text: str, bos: str | int | None = None) -> Tokenizer:
        """Build a tokenizer from the text of a ``tokenizer.json``; ``bos`` as for the constructor.

        Raises:
            ConfigError: The text is no tokenizer, or has no token that can begin a document.
        """
        import tokenizers

        try:
            content = parse_object(text, Path("tokenizer.json"))
            require_bounded(content)
            # What was checked, and not the text, which another parser might read in another way.
            text = canonical_json(content)
            with _failures_told("it cannot be built"):
                backend = tokenizers.Tokenizer.from_str(text)
            return cls(backend, text, bos)
        except LifelongError as error:
            raise ConfigError(f"not a usable tokenizer.json: {error}") from error
        except Exception as error:  # an empty vocabulary, a number out of range
            raise ConfigError(f"not a usable tokenizer.json: {' '.join(str(error).split())}.") from error

    @classmethod
    def stored(cls, text: str, bos_id: int) -> Tokenizer:
        """Build the tokenizer of a committed stage; arguments as for :meth:`from_text`.

        Raises:
            CorruptError: The text is no tokenizer that a stage could have been committed with.
        """
        try:
            return cls.from_text(text, bos_id)
        except ConfigError as error:
            raise CorruptError(f"a committed stage's tokenizer: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers get the text: an unpickled backend would lose `encode_special_tokens`.
        return (Tokenizer.from_text, (self._text, self._bos_id))


def _listed(special: Mapping[str, int]) -> str:
    return ", ".join(sorted(special)[:8]) or "none"


@contextmanager
def _failures_told(what: str) -> Iterator[None]:
    """Turn what the library raises into an error of ours that begins with ``what``.

    It panics where a regular expression gives up, and raises bare exceptions where a model lacks an entry.
    """
    try:
        yield
    except BaseException as error:
        # A panic by name, since no module exports it; it is no Exception, so that few catch it.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what}: {' '.join(str(error).split())}.") from None


def _read_text(path: Path) -> str:
    """Read a text file of bounded size; a DataError says what else it is."""
    refuse_pickled(path)
    with open_file(path) as file:
        data = read_whole(file, MAX_TOKENIZER_BYTES)
    if data is None:
        raise DataError(f"{path}: over {MAX_TOKENIZER_BYTES >> 20} MiB; no tokenizer is as large.")
    return decode(data, str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: the same texts in the same order give the same bytes, for any number of threads.

    Args:
        texts: Training texts.
        vocab_size: Entries wanted, ``<|bos|>`` and the 256 bytes included. A tiny corpus yields fewer.

    Returns:
        A tokenizer that decodes what it encoded to the byte.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        # All 256 bytes, seen in training or not, so that any text can be encoded; sorted, since its order may vary.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def recipe(config: TokenizerConfig, text_bytes: int) -> dict[str, str | int]:
    """Return what a stage key includes of how the tokenizer came about; its hash says the rest.

    Args:
        config: The settings.
        text_bytes: Of the text to train on.
    """
    if config.file is not None:
        # Not the path: moving the file must change no stage key.
        return {"kind": "file"}
    found: dict[str, str | int] = {
        "kind": "byte_level_bpe",
        "vocab_size": config.vocab_size,
        "version": RECIPE_VERSION,
    }
    # Where all of the text is learned from, keys are those of versions that knew no sample.
    return found if text_bytes <= SAMPLE_BYTES else {**found, "sample_bytes": SAMPLE_BYTES}


def sample_texts(documents: Iterable[Document], most_bytes: int) -> Iterator[str]:
    """Yield the texts of the first documents, until they have so many bytes.

    In order of hash, which is that of a corpus, the first ones are a sample that no file or folder decides.
    """
    total = 0
    for document in documents:
        yield document.text
        if (total := total + document.num_bytes) >= most_bytes:
            return


def trained_tokenizer(
    config: TokenizerConfig, corpus: Corpus, cache: Path, check: Callable[[Tokenizer], None] = lambda _: None
) -> Tokenizer:
    """Train a tokenizer on ``corpus.train``, once per recipe and training text.

    Args:
        config: Recipe.
        corpus: The first stage's documents; the held-out ones are not looked at.
        cache: ``cache/tokenizers/<key>.json`` holds what was trained. A damaged file is trained again.
        check: Raises if the tokenizer does not do; called before anything is written.
    """
    identity = {"recipe": recipe(config, summary_of(corpus.train).bytes), "train_hash": corpus.train_hash}
    texts = sample_texts(told_of(corpus.train, "training the tokenizer"), SAMPLE_BYTES)
    return cached_tokenizer(identity, cache, corpus.mode, lambda: train_tokenizer(texts, config.vocab_size), check)


def cached_tokenizer(
    identity: Mapping[str, Any],
    cache: Path,
    mode: int,
    make: Callable[[], Tokenizer],
    check: Callable[[Tokenizer], None] = lambda _: None,
    bos_id: int | None = None,
) -> Tokenizer:
    """A tokenizer that takes time to make, once for all that it depends on.

    Args:
        identity: All that it depends on.
        cache: See :func:`trained_tokenizer`.
        mode: Permissions of its file, whose entries are words of a text.
        make: Makes it.
        check: See :func:`trained_tokenizer`.
        bos_id: Its token that begins a document; by default the first that is known.
    """
    path = cache / "tokenizers" / f"{content_key(identity)[:SHORT]}.json"
    # The check comes before the tokenizer is saved: a mistake in the text leaves no cache behind.
    found = _cached(path, bos_id)
    tokenizer = found or make()
    check(tokenizer)
    if found is None:
        tokenizer.save(path, mode)
        # After the tokenizer: without its hash a file counts as absent, so a kill in between is harmless.
        write_atomic(path.with_suffix(".sha256"), tokenizer.hash)
    return tokenizer


def _cached(path: Path, bos_id: int | None) -> Tokenizer | None:
    try:
        text, digest = (
            read_bounded(one, MAX_TOKENIZER_BYTES, follow=False).decode("utf-8")
            for one in (path, path.with_suffix(".sha256"))
        )
        if digest == text_sha256(text):
            return Tokenizer.from_text(text, bos_id)
    # Missing, damaged, or no file at all: it is trained again.
    except (OSError, UnicodeDecodeError, ConfigError):
        pass
    return None
