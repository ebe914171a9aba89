"""Losslessness, determinism, the one special token, and the cache."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lifelong_moe.config.data import TokenizerConfig
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.tokens import tokenizer as module
from lifelong_moe.data.tokens.tokenizer import (
    BOS,
    SAMPLE_BYTES,
    Tokenizer,
    recipe,
    sample_texts,
    train_tokenizer,
    trained_tokenizer,
)
from lifelong_moe.errors import ConfigError

TEXTS = [f"the cat number {n} sat on the mat, and the dog did not" for n in range(50)]
CORPUS = Corpus("a", [Document(text, text) for text in TEXTS], [Document("held out zzz", "h")], "t" * 64, "h" * 64)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_vocabulary(trained: Tokenizer) -> None:
    assert trained.bos_id == 0
    assert trained.vocab_size == 300
    assert train_tokenizer(["ab"], 4096).vocab_size == 1 + 256 + 1  # <|bos|>, the bytes, one merge


@pytest.mark.parametrize(
    "text", ["the cat", "", " é ß 漢字 🙂\r\n\t\0\u2028", "".join(map(chr, range(256))), "<|bos|>"]
)
def test_decoding_gives_the_text_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode([0, *ids, 0]) == text
    assert trained.bos_id not in ids


def test_special_token_in_text_is_plain_text(trained: Tokenizer) -> None:
    assert trained.encode_batch([BOS, f"a{BOS}b"]) == [trained.encode(BOS), trained.encode(f"a{BOS}b")]
    assert len(trained.encode(BOS)) > 1
    many = train_tokenizer([BOS] * 100, 4096)
    assert many.bos_id not in many.encode(BOS * 3)
    assert many.decode(many.encode(BOS * 3)) == BOS * 3


def test_whether_others_who_read_the_file_put_bos_before_a_text(trained: Tokenizer) -> None:
    content = json.loads(trained.text)
    special = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    named = {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

    def template(*single: object) -> dict[str, object]:
        return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": named}

    for processor, adds in (
        (None, True),  # an export says so in its place
        (template(special, text), True),
        ({"type": "Sequence", "processors": [byte_level, template(special, text)]}, True),
        (template(text), False),
        (template(text, text), False),
        (byte_level, False),
    ):
        tokenizer = Tokenizer.from_text(json.dumps(content | {"post_processor": processor}))
        assert tokenizer.adds_bos == adds, processor
        assert tokenizer.encode("the cat") == trained.encode("the cat")


def test_saving_and_loading(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.hash, loaded.vocab_size, loaded.bos_id) == (trained.hash, trained.vocab_size, trained.bos_id)
    assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert pickle.loads(pickle.dumps(trained)).hash == trained.hash
    reformatted = json.dumps(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")), indent=2)
    (tmp_path / "tokenizer.json").write_text(reformatted, encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == trained.hash


def test_training_is_deterministic_for_any_number_of_threads(trained: Tokenizer) -> None:
    code = (
        "from lifelong_moe.data.tokens.tokenizer import train_tokenizer\n"
        "texts = [f'the cat number {n} sat on the mat, and the dog did not' for n in range(50)]\n"
        "print(train_tokenizer(texts, 300).hash)"
    )
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(Path(module.__file__).parents[3])}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == trained.hash


def _given(path: Path, name: str, special: bool = True) -> Path:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(name)]) if special else backend.add_tokens([name])
    backend.enable_truncation(1)
    backend.save(str(path))
    return path


@pytest.mark.parametrize("name", ["<s>", "<|endoftext|>", "[BOS]"])
def test_given_tokenizer(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(train_tokenizer(TEXTS, 300).text.replace("<|bos|>", name), encoding="utf-8")
    given = Tokenizer.load(path)
    assert (given.bos_id, given.decode(given.encode("cat dog"))) == (0, "cat dog")
    assert 0 not in given.encode(f"cat {name} dog")


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loses text"):
        Tokenizer.load(_given(tmp_path / "t.json", "<s>"))


def test_unusable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no special token that can begin a document; needs one of .* has \[CLS\]"):
        Tokenizer.load(_given(tmp_path / "t.json", "[CLS]"))
    with pytest.raises(ConfigError, match="has none"):
        Tokenizer.load(_given(tmp_path / "t.json", "<s>", special=False))
    with pytest.raises(ConfigError, match=r"no\.json: cannot be read"):
        Tokenizer.load(tmp_path / "no.json")
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"t\.json: not a usable tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_recipe() -> None:
    plain = {"kind": "byte_level_bpe", "vocab_size": 300, "version": 1}
    assert (
        recipe(TokenizerConfig(vocab_size=300), 10)
        == recipe(TokenizerConfig(vocab_size=300, train_on="a"), 10)
        == plain
    )
    # Keys of runs whose text is all learned from stay what they were.
    assert recipe(TokenizerConfig(vocab_size=300), SAMPLE_BYTES) == plain
    assert recipe(TokenizerConfig(vocab_size=300), SAMPLE_BYTES + 1) == {**plain, "sample_bytes": SAMPLE_BYTES}
    assert recipe(TokenizerConfig(file="/some/where.json"), SAMPLE_BYTES + 1) == {"kind": "file"}


def test_a_sample_is_of_the_first_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("a" * 10, "x"), Document("é" * 5, "x"), Document("c", "x")]
    assert [len(list(sample_texts(documents, most))) for most in (1, 10, 11, 20, 21, 22, 99)] == [1, 1, 2, 2, 3, 3, 3]
    whole = trained_tokenizer(TokenizerConfig(vocab_size=300), CORPUS, tmp_path)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 40)
    part = trained_tokenizer(TokenizerConfig(vocab_size=300), CORPUS, tmp_path)
    assert part.hash != whole.hash and part.hash == train_tokenizer(sample_texts(CORPUS.train, 40), 300).hash


def test_prepare_trains_once_on_training_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig(vocab_size=300)
    first = trained_tokenizer(config, CORPUS, tmp_path)
    assert first.hash == train_tokenizer(TEXTS, 300).hash
    (path,) = (tmp_path / "tokenizers").glob("*.json")
    assert len(path.stem) == 16
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_tokenizer", None)
        assert trained_tokenizer(config, CORPUS, tmp_path).hash == first.hash
    path.write_text(path.read_text(encoding="utf-8").replace("cat", "dog", 1), encoding="utf-8")
    assert trained_tokenizer(config, CORPUS, tmp_path).hash == first.hash
    path.write_bytes(b"\xff")
    assert trained_tokenizer(config, CORPUS, tmp_path).hash == first.hash
    trained_tokenizer(TokenizerConfig(vocab_size=301), CORPUS, tmp_path)
    assert len(list((tmp_path / "tokenizers").glob("*.json"))) == 2
