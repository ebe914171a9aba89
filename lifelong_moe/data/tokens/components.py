"""What a given tokenizer is made of, checked in its JSON before it is built: known parts, and texts that stay small.

Normalizers may replace a character by many, one after the other: forty characters became four gigabytes. Each part's
growth is bounded from its settings, in UTF-8 bytes, and so is their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lifelong_moe.errors import ConfigError
from lifelong_moe.redaction import shortened

MAX_GROWTH = 72
"""Most bytes that a byte of text may become on its way to the model, or one of a token on its way back. Published
byte-level tokenizers reach 12, and the most that NFKC and Metaspace could make together is 66."""
MAX_PARTS = 64
"""Most normalizers, pre-tokenizers and decoders together."""
MAX_REGEX_CHARS = 4096
"""Longest regular expression; published ones have a few hundred characters."""
MAX_TOKEN_BYTES = 1 << 16
"""Longest token: a few ids must not become gigabytes of text."""
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece", None)
"""Models that give at most one token for each byte; GPT-2's file, of an early version, does not name its own."""

Part = Mapping[str, Any]
Growth = tuple[float, float]
"""Bytes after a part, as a multiple of those before it and a number added to each piece of text."""


def require_bounded(tokenizer: Part) -> None:
    """Require that a tokenizer is of known parts, and that no text grows much in it.

    Args:
        tokenizer: Content of a ``tokenizer.json``.

    Raises:
        ConfigError: A part is unknown or malformed, or texts may grow by more than :data:`MAX_GROWTH`.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") not in MODELS:
        raise ConfigError(f"the model is of no known type; there are {', '.join(filter(None, MODELS))}.")
    # It leaves out merges at random, so that equal texts would have other tokens under one hash.
    if model.get("dropout"):
        raise ConfigError(f"model.dropout={str(model['dropout'])[:20]}: text must have one encoding; set it to null.")
    parts = {
        "normalizer": list(_parts(tokenizer.get("normalizer"), "normalizer", "normalizers")),
        "pre_tokenizer": list(_parts(tokenizer.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers")),
        "decoder": list(_parts(tokenizer.get("decoder"), "decoder", "decoders")),
    }
    if sum(map(len, parts.values())) > MAX_PARTS:
        raise ConfigError(f"it has more than {MAX_PARTS} normalizers, pre-tokenizers and decoders.")
    factor, added = 1.0, 0.0
    for part in parts["normalizer"]:
        by, plus = _growth("normalizer", part)
        factor, added = factor * by, added * by + plus
    # What is added comes once for each piece, and pieces may be as short as a byte.
    into, out = factor + added, 1.0
    for part in parts["pre_tokenizer"]:
        into *= sum(_growth("pre_tokenizer", part))
    for part in parts["decoder"]:
        out *= sum(_growth("decoder", part))
    if max(into, out) > MAX_GROWTH:
        what = "normalizers and pre-tokenizers" if into > out else "decoders"
        raise ConfigError(f"its {what} may make text {max(into, out):.3g} times as long; at most {MAX_GROWTH} times.")


def _parts(part: object, role: str, members: str) -> Iterator[Part]:
    """The parts of a role, one after the other; sequences may hold sequences."""
    if part is None:
        return
    if not isinstance(part, Mapping):
        raise ConfigError(f"a {role} must be an object; got a {type(part).__name__}.")
    if part.get("type") != "Sequence":
        yield part
        return
    if not isinstance(part.get(members), list):
        raise ConfigError(f'a {role} of type Sequence needs "{members}", a list.')
    for member in part[members]:
        yield from _parts(member, role, members)


def _growth(role: str, part: Part) -> Growth:
    kind = part.get("type")
    known = _GROWTH[role].get(kind) if isinstance(kind, str) else None
    if known is None:
        raise ConfigError(f"a {role} of type {kind} is not known; there are {', '.join(_GROWTH[role])} and Sequence.")
    if "pattern" in part and (pattern := _pattern(part))[0] == "Regex":
        _require_tame(pattern[1])
    return known(part) if callable(known) else (known, 0.0)


def _bytes(part: Part, name: str) -> int:
    text = part.get(name)
    if not isinstance(text, str):
        raise ConfigError(f'a {part.get("type")} needs "{name}", a text; got a {type(text).__name__}.')
    return len(text.encode("utf-8", "surrogatepass"))


def _pattern(part: Part) -> tuple[str, str]:
    """Whether a part's pattern is a ``String`` or a ``Regex``, and its text."""
    pattern = part.get("pattern")
    if isinstance(pattern, Mapping) and len(pattern) == 1:
        ((kind, text),) = pattern.items()
        if kind in ("String", "Regex") and isinstance(text, str):
            return kind, text
    raise ConfigError(f'a {part.get("type")} needs "pattern", one String or Regex.')


def _replaced(pattern_bytes: int, content_bytes: int) -> Growth:
    # An empty pattern, or a regular expression, may match before each byte and at the end.
    if pattern_bytes == 0:
        return 1.0 + content_bytes, content_bytes
    return max(1.0, content_bytes / pattern_bytes), 0.0


def _replace(part: Part) -> Growth:
    kind, text = _pattern(part)
    return _replaced(len(text.encode("utf-8", "surrogatepass")) if kind == "String" else 0, _bytes(part, "content"))


def _prepend(part: Part) -> Growth:
    return 1.0, _bytes(part, "prepend")


def _byte_level(part: Part) -> Growth:
    # Each byte becomes a character of at most two; a space before it, too.
    return 2.0, 2.0 if part.get("add_prefix_space", True) else 0.0


def _metaspace(part: Part) -> Growth:
    size = _bytes(part, "replacement")
    return max(1.0, size), 0.0 if part.get("prepend_scheme") == "never" else size


def _fixed_length(part: Part) -> Growth:
    # Pieces of no length make the library panic.
    if not isinstance(part.get("length"), int) or part["length"] < 1:
        raise ConfigError('a FixedLength needs "length", at least 1.')
    return 1.0, 0.0


# Unicode's own bounds for UTF-8 (its FAQ on normalization): 3 for NFC and NFD, 11 for NFKC and NFKD.
_GROWTH: dict[str, dict[str, float | Callable[[Part], Growth]]] = {
    "normalizer": {
        # Spaces around each Chinese character (5 bytes for 3), NFD, lower case.
        "BertNormalizer": 5 / 3 * 3 * 1.5,
        "ByteLevel": 2.0,
        "Lowercase": 1.5,
        "NFC": 3.0,
        "NFD": 3.0,
        "NFKC": 11.0,
        "NFKD": 11.0,
        "Nmt": 1.0,
        "Prepend": _prepend,
        "Replace": _replace,
        "Strip": 1.0,
        "StripAccents": 1.0,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": 1.0,
        "ByteLevel": _byte_level,
        "CharDelimiterSplit": 1.0,
        "Digits": 1.0,
        "FixedLength": _fixed_length,
        "Metaspace": _metaspace,
        "Punctuation": 1.0,
        "Split": 1.0,
        "UnicodeScripts": 1.0,
        "Whitespace": 1.0,
        "WhitespaceSplit": 1.0,
    },
    "decoder": {
        "BPEDecoder": lambda part: _replaced(_bytes(part, "suffix"), 1),
        "ByteFallback": 1.0,
        # Bytes that are no UTF-8 become U+FFFD, of three.
        "ByteLevel": 3.0,
        "CTC": lambda part: _replaced(_bytes(part, "word_delimiter_token"), 1),
        "Fuse": 1.0,
        "Metaspace": 1.0,
        "Replace": _replace,
        "Strip": 1.0,
        # A space before each token.
        "WordPiece": 2.0,
    },
}


def _require_tame(pattern: str) -> None:
    """Refuse a regular expression that repeats what repeats, such as ``(a+)+``: its time doubles with each character.

    Others may take long as well; the library gives up after so many steps, by a panic.
    """
    if len(pattern) > MAX_REGEX_CHARS:
        raise ConfigError(f"a regular expression of {len(pattern):,} characters; at most {MAX_REGEX_CHARS:,}.")
    groups = [False]  # for each open group, whether something in it repeats without end
    position = 0
    while position < len(pattern):
        char, inner = pattern[position], False
        position += 1
        if char == "\\":
            position += 1
        elif char == "[":
            position = _end_of_class(pattern, position)
        elif char == "(":
            groups.append(False)
            # `(?:`, `(?=`, `(?i:`: the question mark repeats nothing.
            position += pattern.startswith("?", position)
            continue
        elif char == ")" and len(groups) > 1:
            inner = groups.pop()
        repeats, position = _quantifier(pattern, position)
        if inner and repeats:
            raise ConfigError(
                f"a regular expression repeats what repeats, which takes for ever: {shortened(pattern, 80)}"
            )
        groups[-1] |= inner or repeats


def _end_of_class(pattern: str, position: int) -> int:
    """The position after a class of characters, which may hold classes."""
    depth = 1
    while depth and position < len(pattern):
        depth += {"[": 1, "]": -1}.get(pattern[position], 0)
        position += 2 if pattern[position] == "\\" else 1
    return position


def _quantifier(pattern: str, position: int) -> tuple[bool, int]:
    """Whether what ends here repeats without end, and the position after its quantifiers."""
    repeats = False
    while position < len(pattern) and pattern[position] in "*+?{":
        end = position
        if pattern[position] == "{" and (end := pattern.find("}", position)) < 0:
            break
        repeats |= pattern[position] in "*+" or (pattern[position] == "{" and pattern[end - 1] == ",")
        position = end + 1
    return repeats, position
