"""What stands in a shard, and what happens when its files are damaged."""

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.data.tokens import shards
from lifelong_moe.data.tokens.shards import ShardDocuments, TokenizedCorpus, TokenShard, tokenize_corpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    documents = [Document(f"number {n} is an é in {n * n} texts", f"u{n}") for n in range(30)]
    return build_corpus("a", documents, SourceConfig(files="unused", heldout_fraction=0.3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["number is an in texts"] * 3, 270)


def _directory(cache: Path, data_hash: str) -> Path:
    (path,) = (cache / "tokens").glob(f"{data_hash[:16]}-*")
    return path


def _same(one: TokenizedCorpus, other: TokenizedCorpus) -> bool:
    parts = [(one.train, other.train), (one.heldout, other.heldout)]
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in parts
        for name in ("tokens", "offsets", "text_bytes")
    )


def test_contents(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenized = tokenize_corpus(corpus, tokenizer, tmp_path)
    shard = tokenized.train
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.dtype == np.uint16
    assert not shard.tokens.flags.writeable
    assert shard.num_documents == len(corpus.train)
    for index, document in enumerate(corpus.train):
        assert shard.document(index).tolist() == [0, *tokenizer.encode(document.text)]
        assert shard.text_bytes[index] == document.num_bytes
    assert int(shard.offsets[-1]) == shard.num_tokens == len(shard.tokens)
    text_bytes = sum(document.num_bytes for document in corpus.train)
    assert shard.bytes_per_token == text_bytes / (shard.num_tokens - len(corpus.train))
    assert (tokenized.name, tokenized.train_hash, tokenized.heldout_hash, tokenized.tokenizer_hash) == (
        "a",
        corpus.train_hash,
        corpus.heldout_hash,
        tokenizer.hash,
    )
    with pytest.raises(IndexError):
        shard.document(-1)


def test_encoding_in_batches_changes_nothing(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize_corpus(corpus, tokenizer, tmp_path / "a")
    monkeypatch.setattr(shards, "_BATCH_BYTES", 50)
    assert _same(whole, tokenize_corpus(corpus, tokenizer, tmp_path / "b"))


def test_large_vocabularies_take_four_bytes(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Large(Tokenizer):
        vocab_size = 65537

    large = Large(tokenizer._backend)
    assert tokenize_corpus(corpus, large, tmp_path).train.tokens.dtype == np.uint32


def test_written_once(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize_corpus(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(shards, "_build", None)
    assert _same(first, tokenize_corpus(corpus, tokenizer, tmp_path))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "text_bytes.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_part_is_made_again_and_the_other_left_alone(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, name: str, damage: str
) -> None:
    first = tokenize_corpus(corpus, tokenizer, tmp_path)
    path = _directory(tmp_path, corpus.heldout_hash) / name
    other = _directory(tmp_path, corpus.train_hash)
    untouched = other.stat().st_ino
    data = path.read_bytes()
    path.unlink()  # a new file: the old one is still mapped by the first shard
    if damage != "remove":
        path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert _same(first, tokenize_corpus(corpus, tokenizer, tmp_path))
    assert path.read_bytes() == data
    assert other.stat().st_ino == untouched
    assert sorted(entry.name for entry in (tmp_path / "tokens").iterdir()) == sorted([path.parent.name, other.name])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.bin", np.full(4, 60_000, "<u2")),  # no token of the vocabulary
        ("offsets.bin", np.array([0, 1 << 40], "<i8")),
        ("offsets.bin", np.array([0, -1, 4], "<i8")),
        ("text_bytes.bin", np.array([], "<i8")),
    ],
)
def test_numbers_that_are_no_tokens_are_made_again_whatever_the_manifest_says(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, name: str, content: np.ndarray
) -> None:
    first = tokenize_corpus(corpus, tokenizer, tmp_path)
    directory = _directory(tmp_path, corpus.train_hash)
    manifest = json.loads((directory / "manifest.json").read_text())
    data = content.tobytes()
    (directory / name).unlink()
    (directory / name).write_bytes(data)
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert _same(first, tokenize_corpus(corpus, tokenizer, tmp_path))
    (directory / "manifest.json").write_text("[" * 60_000)
    assert _same(first, tokenize_corpus(corpus, tokenizer, tmp_path))
    (directory / name).rename(directory / "elsewhere")
    (directory / name).symlink_to("elsewhere")
    assert _same(first, tokenize_corpus(corpus, tokenizer, tmp_path))
    assert not (directory / name).is_symlink()


def test_manifest(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize_corpus(corpus, tokenizer, tmp_path)
    directory = _directory(tmp_path, corpus.train_hash)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["dtype"] == "<u2"
    for name, entry in manifest["files"].items():
        assert entry["size"] == (directory / name).stat().st_size
    assert directory.name == f"{corpus.train_hash[:16]}-{tokenizer.hash[:16]}"


def test_failure_leaves_nothing_behind(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shards, "_write_arrays", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenize_corpus(corpus, tokenizer, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "text_bytes.bin"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_says_so(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        shards._write_arrays(corpus.train, tmp_path, tokenizer, "<u2")
    assert caught.value.errno == errno.ENOSPC


def test_lost_race_takes_the_winners_files(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = shards._build

    def build_twice(documents: list[Document], directory: Path, given: Tokenizer, mode: int) -> None:
        build(documents, directory, given, mode)
        build(documents, directory, given, mode)

    monkeypatch.setattr(shards, "_build", build_twice)
    tokenize_corpus(corpus, tokenizer, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_documents_of_several_shards_stand_in_one_row() -> None:
    def shard(*lengths: int) -> TokenShard:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return TokenShard(np.arange(sum(lengths)) + 100 * len(lengths), offsets, np.zeros(len(lengths)))

    parts = [shard(2, 0, 1), shard(), shard(3)]
    documents = ShardDocuments(parts)
    expected = [[300, 301], [], [302], [100, 101, 102]]
    assert len(documents) == 4 and [document.tolist() for document in documents] == expected
    assert [document.tolist() for document in documents[::2]] == expected[::2]
    assert np.shares_memory(documents[3], parts[2].tokens)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"document {index} of 4"):
            documents[index]
    assert len(ShardDocuments([])) == 0


def _encoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int = 1 << 30) -> list[str]:
    """Texts that were encoded; more than ``most`` are as a kill."""
    texts: list[str] = []
    original = tokenizer.encode_batch

    def noted(batch: Sequence[str]) -> list[list[int]]:
        if len(texts) + len(batch) > most:
            raise KeyboardInterrupt
        texts.extend(batch)
        return original(batch)

    monkeypatch.setattr(tokenizer, "encode_batch", noted)
    return texts


def _many(number: int) -> Corpus:
    texts = [f"text number {n} of many, {'which is long ' * (n % 9)}" for n in range(number)]
    config = SourceConfig(files="unused", heldout_fraction=0.1)
    return build_corpus("many", [Document(text, f"s{n}") for n, text in enumerate(texts)], config)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 900)
    monkeypatch.setattr(shards, "_BATCH_BYTES", 200)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("most", [3, 40, 100, 170])
def test_a_killed_process_goes_on(
    most: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = _many(200)
    whole = tokenize_corpus(corpus, tokenizer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        texts = _encoded(tokenizer, patch, most)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(corpus, tokenizer, tmp_path)
        done = len(texts)
    kept = sum(
        json.loads(path.read_text())["files"]["text_bytes.bin"]["size"] // 8
        for path in tmp_path.glob("tokens/piece-*/manifest.json")
    )
    assert done - kept < 40
    texts = _encoded(tokenizer, monkeypatch)
    again = tokenize_corpus(corpus, tokenizer, tmp_path)
    assert _same(whole, again) and len(texts) == 200 - kept
    assert not list(tmp_path.glob("tokens/piece-*"))
    for path in (tmp_path / "whole/tokens").rglob("*.bin"):
        assert path.read_bytes() == (tmp_path / "tokens" / path.parent.name / path.name).read_bytes()


@pytest.mark.usefixtures("small_pieces")
def test_a_grown_corpus_costs_what_is_new(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_corpus(_many(200), tokenizer, tmp_path)
    whole = tokenize_corpus(_many(230), tokenizer, tmp_path / "whole")
    texts = _encoded(tokenizer, monkeypatch)
    assert _same(whole, tokenize_corpus(_many(230), tokenizer, tmp_path))
    # What a unit's hash moved to the other side may be among them.
    assert 20 <= len(texts) <= 60


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["digests.bin", "tokens.bin"])
def test_damaged_tokens_are_not_taken_over(
    damage: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_corpus(_many(200), tokenizer, tmp_path)
    whole = tokenize_corpus(_many(230), tokenizer, tmp_path / "whole")
    for path in tmp_path.glob(f"tokens/*/{damage}"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    texts = _encoded(tokenizer, monkeypatch)
    assert _same(whole, tokenize_corpus(_many(230), tokenizer, tmp_path)) and len(texts) == 230
