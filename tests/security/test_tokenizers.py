"""A ``tokenizer.json`` comes from a hub or with a store: no text grows without bound in it, and no panic is ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_moe.data.tokens import components
from lifelong_moe.data.tokens.tokenizer import _PROBE, Tokenizer, _failures_told, train_tokenizer
from lifelong_moe.errors import ConfigError, CorruptError
from tests.e2e.conftest import Cli

TRAINED = train_tokenizer(["the cat sat on the mat, and the dog did not"] * 20, 300)
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ALONE = {**BYTES, "use_regex": False}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def after(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def changed(**parts: Any) -> str:
    return json.dumps({**json.loads(TRAINED.text), **parts})


BYTE_LEVEL = {
    "GPT-2": (None, {**BYTES, "add_prefix_space": False}),
    "OLMoE": ({"type": "NFC"}, BYTES),
    "SmolLM": (None, after({"type": "Digits", "individual_digits": True}, BYTES)),
    "Llama 3": (None, after(split(GPT4), BYTES_ALONE)),
    "Qwen": ({"type": "NFC"}, after(split(GPT4.replace("{1,3}", "")), BYTES_ALONE)),
    "Mistral NeMo": (None, after(split(GPT4O), BYTES_ALONE)),
    "DeepSeek": (
        {"type": "Sequence", "normalizers": []},
        after(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTES_ALONE),
    ),
    "Falcon": (None, after({"type": "Punctuation", "behavior": "Contiguous"}, BYTES, split("[0-9][0-9][0-9]"))),
    "BLOOM": (None, after(split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES_ALONE)),
    "digits in threes": (None, after(split(r"(?=(\d{3})+(?!\d))"), split(GPT4), BYTES_ALONE)),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_tokenizers_of_known_models_are_read(name: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer = BYTE_LEVEL[name]
    processor = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    text = changed(normalizer=normalizer, pre_tokenizer=pre_tokenizer, post_processor=processor)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("the cat, 1234  漢\n")) == "the cat, 1234  漢\n"
    assert tokenizer.hash == Tokenizer.from_text(text).hash


@pytest.mark.parametrize("metaspace", [True, False])
def test_tokenizers_of_llama_2_and_mistral_are_read(metaspace: bool, tmp_path: Path) -> None:
    """BPE over characters with bytes to fall back on, spaces shown as ▁."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "the"]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)}, "merges": ["t h", "th e"],
    }  # fmt: skip
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    back = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "model": model,
        "added_tokens": [{"id": index, "content": tokens[index], **added} for index in range(3)],
        "normalizer": None if metaspace else prepend, "pre_tokenizer": spaces if metaspace else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": back},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.bos_id == 1 and tokenizer.decode(tokenizer.encode("the 漢")) == "the 漢"


def doubled(times: int) -> dict[str, Any]:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [double] * times}


GROWING = {
    "doubled 26 times": {"normalizer": doubled(26)},
    "one by a million": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}},
    "nothing by many": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "b" * 100}},
    "by expression": {"normalizer": {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "b" * 100}},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "b" * 10**6}},
    "in sequences of sequences": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [doubled(4), {"type": "Sequence", "normalizers": [doubled(4)]}],
        }
    },
    "bytes of bytes": {"pre_tokenizer": after(*[BYTES] * 20)},
    "spaces of spaces": {
        "pre_tokenizer": after(*[{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}] * 9)
    },
    "on the way back": {
        "decoder": {"type": "Replace", "pattern": {"String": "t"}, "content": "t" * 1000},
    },
    "normalized again and again": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 4}},
}


@pytest.mark.parametrize("kind", GROWING)
def test_no_text_grows_without_bound(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"may make text .* times as long; at most 72 times\.$"):
        Tokenizer.from_text(changed(**GROWING[kind]))


def test_a_post_processor_repeats_nothing() -> None:
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [piece] * 1000, "pair": [piece], "special_tokens": {}}
    assert Tokenizer.from_text(changed(post_processor=processor)).encode("cat") == TRAINED.encode("cat")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "a normalizer of type Precompiled"),
        ({"normalizer": {"type": ["NFC"]}}, "a normalizer of type "),
        ({"normalizer": {}}, "a normalizer of type None is not known"),
        ({"normalizer": [1]}, "a normalizer must be an object; got a list"),
        ({"normalizer": {"type": "Sequence", "normalizers": {}}}, 'needs "normalizers", a list'),
        ({"normalizer": {"type": "Replace", "pattern": "a", "content": "b"}}, 'needs "pattern", one String or Regex'),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": 1}}, 'needs "content", a text'),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "a pre_tokenizer of type Nonsense is not known; there are Bert"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "at least 1"),
        ({"decoder": {"type": "Nonsense"}}, "a decoder of type Nonsense is not known"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 65}}, "more than 64"),
        ({"model": {"type": "Nonsense"}}, "the model is of no known type"),
        ({"model": []}, "the model is of no known type"),
        ({"model": {**json.loads(TRAINED.text)["model"], "dropout": 0.5}}, "model.dropout=0.5: text must have one"),
        ({"model": {**json.loads(TRAINED.text)["model"], "dropout": "x"}}, "model.dropout=x: text must have one"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": 1}}, "it cannot be built: "),
        ({"pre_tokenizer": split("a" * 5000)}, "a regular expression of 5,000 characters"),
    ],
)
def test_what_is_unknown_or_malformed_is_refused_by_name(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^not a usable tokenizer.json: .*{message}"):
        Tokenizer.from_text(changed(**part))


def test_no_key_is_read_in_two_ways() -> None:
    """Python's parser takes the last of two keys, another one might take the first."""
    text = changed()[:-1] + ', "normalizer": null}'
    with pytest.raises(ConfigError, match="key 'normalizer' occurs twice"):
        Tokenizer.from_text(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        Tokenizer.from_text('{"model": ' + "[" * 100_000)


@pytest.mark.parametrize(
    "regex", ["(a+)+c", "(?:a*)*", r"((\w|x)+)*!", "(a{2,})+", "([a-z]+|b)*?c", "(?>a+b?)+", "(a*(b))*"]
)
@pytest.mark.parametrize("role", ["normalizer", "pre_tokenizer"])
def test_expressions_that_take_for_ever_are_refused(role: str, regex: str) -> None:
    part = split(regex) if role == "pre_tokenizer" else {"type": "Replace", "pattern": {"Regex": regex}, "content": ""}
    with pytest.raises(ConfigError, match="a regular expression repeats what repeats"):
        Tokenizer.from_text(changed(**{role: part}))


def test_a_panic_becomes_an_error() -> None:
    """In a process of its own, since the library also writes to standard error."""
    code = (
        "import sys\n"
        "from lifelong_moe.data.tokens.tokenizer import Tokenizer\n"
        "from pipelines.cli import exit_code\n"
        "tokenizer = Tokenizer.from_text(sys.stdin.read())\n"
        "sys.exit(exit_code(lambda: tokenizer.encode('a' * 40 + 'd')))"
    )
    optional = "(?:" + "a?" * 30 + "a" * 30 + ")c"
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], input=changed(pre_tokenizer=split(optional)), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert run.stderr.splitlines()[-1].startswith("ConfigError: tokenizer: it fails on this text: Onig: Regex search")
    assert "Traceback" not in run.stderr


CHARACTERS = {"<|bos|>": 0} | {char: place for place, char in enumerate(sorted(set(_PROBE + "<|bos|>")), start=1)}


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": CHARACTERS, "unk_token": "[UNK]"},
        {
            "type": "WordPiece", "vocab": CHARACTERS, "unk_token": "[UNK]", "continuing_subword_prefix": "",
            "max_input_chars_per_word": 100,
        },
        {"type": "Unigram", "unk_id": None, "vocab": [[char, -1.0] for char in CHARACTERS]},
        {"type": "BPE", "vocab": CHARACTERS, "merges": [], "unk_token": "[UNK]"},
    ],
    ids=lambda model: model["type"],
)  # fmt: skip
def test_a_model_that_lacks_an_entry_fails_in_a_line(model: dict[str, Any], tmp_path: Path) -> None:
    """Each knows all that it is asked before it is used, and nothing else."""
    text = changed(model=model, pre_tokenizer=split("(?m:.)"), decoder={"type": "Fuse"})
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"^tokenizer: it fails on this text: .*(unk|UNK|Unk).*\.$"):
        tokenizer.encode("§")


@pytest.mark.parametrize("dropout", [None, 0, 0.0])
def test_a_model_without_dropout_is_read(dropout: float | None) -> None:
    model = {**json.loads(TRAINED.text)["model"], "dropout": dropout}
    assert Tokenizer.from_text(changed(model=model)).encode("cat") == TRAINED.encode("cat")


def test_a_store_s_tokenizer_is_damage_and_no_mistake_of_the_user() -> None:
    with pytest.raises(CorruptError, match="a committed stage's tokenizer: not a usable tokenizer"):
        Tokenizer.stored(changed(normalizer=doubled(26)), 0)


def test_a_token_is_no_book(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifelong_moe.data.tokens.tokenizer.MAX_TOKEN_BYTES", 6)
    with pytest.raises(ConfigError, match="a token of 7 bytes; at most 6"):
        Tokenizer.from_text(changed())


def test_growth_is_that_of_the_library() -> None:
    """Each part's bound holds for texts made to be its worst."""
    from tokenizers import normalizers

    worst = ["\ufdfa", "\u1d1c0", "\u0ddd", "Ⱦ", "漢", "é", "\U0001d1c0", "\u0390", "a", " ", "İ"]
    parts = {
        "NFC": normalizers.NFC(), "NFD": normalizers.NFD(), "NFKC": normalizers.NFKC(), "NFKD": normalizers.NFKD(),
        "Lowercase": normalizers.Lowercase(), "BertNormalizer": normalizers.BertNormalizer(), "Nmt": normalizers.Nmt(),
        "StripAccents": normalizers.StripAccents(), "Strip": normalizers.Strip(), "ByteLevel": normalizers.ByteLevel(),
    }  # fmt: skip
    for name, part in parts.items():
        bound = components._GROWTH["normalizer"][name]
        assert isinstance(bound, float)
        for text in worst:
            assert len(part.normalize_str(text).encode()) <= bound * len(text.encode()), (name, text)


TEXTS = st.text(alphabet=st.sampled_from("aab ▁\n\ufdfa\u1d1c0\u0dddȾ漢é\u0390İ"), min_size=1, max_size=12)
PATTERNS = st.one_of(
    st.builds(lambda text: {"String": text}, st.text(alphabet="ab ▁", max_size=3)),
    st.sampled_from([{"Regex": regex} for regex in ("a*", "a|b", "", r"\s", "[^a]", "a{2}", ".", "(?=a)")]),
)
CONTENTS = st.text(alphabet="ab▁ \ufdfa", max_size=6)
NORMALIZERS = st.one_of(
    st.builds(
        lambda kind: {"type": kind}, st.sampled_from(["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Nmt"])
    ),
    st.builds(lambda text: {"type": "Prepend", "prepend": text}, CONTENTS),
    st.builds(lambda text, content: {"type": "Replace", "pattern": text, "content": content}, PATTERNS, CONTENTS),
    st.just(
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": True,
            "lowercase": True,
        }
    ),
)
PRE_TOKENIZERS = st.one_of(
    st.builds(lambda first: {**BYTES, "add_prefix_space": first}, st.booleans()),
    st.builds(
        lambda scheme: {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True},
        st.sampled_from(["always", "never", "first"]),
    ),
    st.builds(lambda pattern: {**split(""), "pattern": pattern}, PATTERNS),
    st.just({"type": "Digits", "individual_digits": True}),
)


@settings(max_examples=200)
@given(st.lists(NORMALIZERS, max_size=4), st.lists(PRE_TOKENIZERS, max_size=3), TEXTS)
def test_what_is_accepted_grows_no_more_than_is_said(
    normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]], text: str
) -> None:
    """The library's own result, for parts and texts made to grow."""
    from tokenizers import Tokenizer as Backend

    content = {
        **json.loads(TRAINED.text),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": after(*pre_tokenizers),
    }
    try:
        components.require_bounded(content)
        # The library itself panics on some chains, such as of matches without length.
        with _failures_told("it fails"):
            backend = Backend.from_str(json.dumps(content))
            normalized = backend.normalizer.normalize_str(text)
            pieces = backend.pre_tokenizer.pre_tokenize_str(normalized)
    except ConfigError:
        return
    size = max(len(normalized.encode()), sum(len(piece.encode()) for piece, _ in pieces))
    assert size <= components.MAX_GROWTH * len(text.encode())


@pytest.mark.parametrize(
    "command",
    [["generate", "tiny", "a"], ["evaluate", "tiny", "--data", "fruit.jsonl"], ["inspect", "tiny", "--text", "a"]],
)
def test_a_stage_is_read_with_its_own_tokenizer(
    command: list[str], trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    shutil.copytree(trained_once, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    path = next(Path("mlruns/stages").glob("fruit-*/tokenizer.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    # The same entries under each other's ids: another text would come out of a stage that "is verified".
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    data = json.dumps(content).encode()
    path.write_bytes(data)
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.with_name("manifest.json").write_text(json.dumps(manifest))
    result = cli(*command)
    assert (result.code, "tokenizer.json: is" in " ".join(result.err.split())) == (7, True), result.err
