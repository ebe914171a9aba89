"""Secrets, noted where they enter, and kept out of everything that is printed or stored.

Nobody can tell a secret by its look. So each is known by where it came from: a reference to the environment in a
configuration, user, password, path and query of an address, a variable that a client of a server reads. What the
configuration says openly, the names in it, and the working directory are no secrets.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, unquote_plus

MASK = "***"
# A shorter text stands in too many others by chance; a password of an address is removed with its address anyway.
_LEAST = 4
_ANYWHERE = 8
"""Characters from which a secret is found within words too."""
_LEAST_DIGITS = 12
"""Digits from which a number is taken for a secret; a shorter one is a setting."""
_PLAIN = re.compile(r"[+-]?[\d_.]+(?:e[+-]?\d+)?|true|false|null|none|yes|no|on|off", re.IGNORECASE)
_CLIENTS = r"(?:MLFLOW|DATABRICKS|HF|HUGGING_?FACE(?:_HUB)?|AWS|AZURE|GOOGLE|PG|MYSQL)_?"
_USUAL_PATHS = {"", "mlflow", "ml", "tracking", "api"}
_WORD = re.compile("[a-z]{1,10}")
_READ_BY_CLIENTS = re.compile(
    rf"{_CLIENTS}(?:.*_)?(?:TOKEN|PASSWORD|PASSPHRASE|PWD|SECRET|CREDENTIALS?|KEY|HEADERS?|CONNECTION_STRING)"
    rf"(?:_.*)?"
)
_ADDRESS = re.compile(r"(?:MLFLOW|DATABRICKS|HF)_(?:.*_)?(?:URI|URL|HOST|ENDPOINT)")
"""Variables that name a server of ours, in whose path too a secret may stand."""
# One pass, however many "://" a hostile text holds.
_URL = re.compile(r"://([^\s\"'<>?]*)(?:\?(\S*))?")
# Of a connection string such as ODBC's, ``PWD={a;b};UID=me``, or of headers.
_WITHIN = re.compile(r"(?:^|[;,])[^=;,]*=\s*(?:\{([^}]*)\}|([^;,]*))")
_QUOTES = re.compile("[\"'<>]")
_OF_A_LOGIN = ("HOME", "PATH", "PWD", "SHELL", "USER", "LOGNAME", "LANG", "TMPDIR")
"""Variables that every process has: their values are no secret to a program on this machine."""


class _Known:
    """What was noted in this process."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}
        """By secret, what is shown in its place."""
        self.said = ""
        """What is no secret, nor is any part of it, a line each."""


_known = _Known()


def note(secret: str, shown: str = MASK) -> None:
    """Note a secret.

    Args:
        secret: Its text; each of its lines counts too.
        shown: What stands in its place, such as the reference that it came from.
    """
    keep_out_of_logs()
    _known.shown.setdefault(secret, shown)


def note_variable(name: str) -> None:
    """Note the value of an environment variable to which a configuration refers; absent ones have none."""
    if (value := os.environ.get(name)) is not None:
        note(value, f"${{oc.env:{name}}}")
        if "://" in value:
            note_address(value)


def note_address(uri: str) -> None:
    """Note the parts of an address that may be secret: user and password, path and query."""
    for part in _told_apart(uri):
        note(part)


def say_openly(texts: Iterable[str]) -> None:
    """Note texts that are no secret, although a secret may be equal to a part of them."""
    new = {text for text in texts if text and text not in _known.said}
    _known.said = "\n".join([_known.said, *sorted(new)]) if new else _known.said


def redact(text: str, uri: str = "") -> str:
    """Replace every known secret within a text, however it is escaped there.

    Args:
        text: What is to be printed or stored.
        uri: Address that the text is about; then all its parts go, such as a path that is a word.
    """
    return _without(_secrets() | {part: MASK for part in _secret_parts(uri)}, text)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, without known secrets: of one that is cut, a part would stay."""
    return redact(text)[:most]


def _secrets() -> dict[str, str]:
    """All that is secret now, with what is shown in its place."""
    known = dict(_of_environment()) | _known.shown
    said = f"{_known.said}\n{_working_directory()}"
    # Clients send a value without the blanks around it, and a tool may print one line of it.
    lines = {line.strip(): shown for one, shown in known.items() for line in (one, *one.splitlines())}
    return {one: shown for one, shown in lines.items() if _is_secret(one) and one not in said}


def _without(secrets: Mapping[str, str], text: str) -> str:
    if not secrets:
        return text
    # Longest first: a password may be a part of the address that is noted too.
    found = {spelled: shown for one, shown in secrets.items() for spelled in _spellings(one)}
    text = _pattern(_longest_first(found)).sub(lambda match: found[match[0]], text)
    if "%" not in text:
        return text
    ordered = _longest_first(secrets)
    return _percent_pattern(ordered).sub(lambda match: secrets[ordered[(match.lastindex or 1) - 1]], text)


def _longest_first(secrets: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(secrets, key=lambda one: (-len(one), one)))


def redacted(data: Any) -> Any:
    """Replace known secrets in all texts within plain data; names of entries and numbers stay."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, Mapping):
        return {name: redacted(value) for name, value in data.items()}
    return [redacted(one) for one in data] if isinstance(data, list | tuple) else data


def without_credentials(text: str, mask: str = "") -> str:
    """Remove user, password and query, which may be secret, from every URL in a text.

    Args:
        text: A URL, or a message that contains some.
        mask: Their replacement, to show that something was there.
    """
    return _URL.sub(lambda found: f"://{_open_part(found[1], found[2], mask)}", text)


def _open_part(place: str, query: str | None, mask: str) -> str:
    """What may be shown of an address, after its scheme."""
    is_local = place.startswith("/")  # a path of this machine, which has no user
    if not is_local and query and "@" in query and not _QUOTES.search(query):
        if "=" in query.rpartition("@")[0]:
            return mask  # whether this "@" ends a user's password or is in that of the query, nobody can tell
        # The last "@" counts: a database's password may hold "/", "#", "?" and "@".
        place, separator, query = f"{place}?{query}".rpartition("@")[2].partition("?")
        place, query = f"@{place}", query if separator else None
    _, at, host = ("", "", place) if is_local else place.rpartition("@")
    shown = f"{mask}@{host}" if at and mask else host
    return shown if query is None or not mask else f"{shown}?{mask}"


def shown_address(uri: str) -> str:
    """An address as it may be printed and stored; of a server without its path, which may hold a token.

    A path of words that are used for MLflow everywhere stays, so that links lead somewhere.
    """
    address = without_credentials(uri, mask=MASK)
    scheme, separator, rest = address.partition("://")
    if not is_web(uri):
        return address
    host, slash, path = rest.partition("/")
    shown = path if set(path.split("/")) <= _USUAL_PATHS else MASK
    return f"{scheme}{separator}{host}{slash}{shown}"


def is_web(uri: str) -> bool:
    """Whether an address is of a server that speaks HTTP."""
    return uri.partition("://")[0].lower() in ("http", "https")


def is_setting(text: str) -> bool:
    """Whether a text is a number or a truth value, such as a configuration holds, and no secret."""
    return len(text) < _LEAST_DIGITS and _PLAIN.fullmatch(text) is not None


def environment_without_secrets() -> dict[str, str]:
    """The environment for a program that is not ours, without the variables that hold secrets of ours."""
    kept = {name: value for name, value in os.environ.items() if name in _OF_A_LOGIN}
    secrets = {one: shown for one, shown in _secrets().items() if one not in kept.values()}
    others = {name: value for name, value in os.environ.items() if not _READ_BY_CLIENTS.fullmatch(name)}
    return kept | {name: value for name, value in others.items() if _without(secrets, value) == value}


def _secret_parts(uri: str) -> list[str]:
    """Parts of an address that may be secret, as they stand in it and decoded."""
    _, separator, whole = uri.partition("://")
    if not separator:
        return []
    # What has no host has no user, though a path may hold "@".
    user, _, rest = ("", "", whole) if whole.startswith("/") else whole.rpartition("@")
    name, colon, password = user.partition(":")
    # A lone name may be a token. Clients that take another "@" or "/" for the end quote parts of a password.
    parts: list[str] = [user, password, *re.split(r"[/@#?:]", password)] if colon else [name]
    parts += [_basic(unquote(name), unquote(password))] if user else []
    # An "@" may stand in the query too.
    for one in (whole, rest):
        parts += _in_query(one.partition("?")[2])
    if is_web(uri):
        path = rest.partition("?")[0].partition("/")[2]
        parts += [path, *path.split("/")]
    return [spelled for part in parts for spelled in {part, unquote(part)} if spelled]


def _in_query(query: str) -> Iterator[str]:
    """A query, its values, and values within them."""
    yield query
    for pair in re.split("[&#]", query):
        value = unquote_plus(raw := pair.partition("=")[2])
        yield from (raw, value, *value.split("@"))
        yield from _within(value)


def _within(value: str) -> Iterator[str]:
    """Values within a connection string or headers."""
    for braced, plain in _WITHIN.findall(value):
        yield braced or plain


def _basic(name: str, password: str) -> str:
    """User and password as HTTP's basic authorization sends them."""
    return base64.b64encode(f"{name}:{password}".encode()).decode()


def _told_apart(uri: str) -> list[str]:
    """Secret parts of an address that can be told from other text: no words such as ``mlflow`` or ``api``."""
    # Where the address itself is shown, and in messages about it, such words go too.
    return [part for part in _secret_parts(uri) if not _WORD.fullmatch(part)]


def _of_environment() -> Iterator[tuple[str, str]]:
    """Secrets that clients of servers find in the environment, as it is now."""
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if password:
        yield _basic(user, password), "$MLFLOW_TRACKING_PASSWORD"
    for name, value in os.environ.items():
        if _is_credential(name):
            yield value, f"${name}"
            yield from ((part, f"${name}") for part in _within(value) if not _WORD.fullmatch(part))
        elif _is_address(name):
            yield from ((part, f"${name}") for part in _told_apart(value))
        elif "://" in value and "@" in value:
            # Of others, such as a proxy or a database, the password alone: their paths are none of ours.
            yield from ((part, f"${name}") for part in _told_apart(value.rpartition("@")[0] + "@"))


# Every line that is written asks about every variable.
@lru_cache(maxsize=1024)
def _is_credential(name: str) -> bool:
    return _READ_BY_CLIENTS.fullmatch(name) is not None


@lru_cache(maxsize=1024)
def _is_address(name: str) -> bool:
    return _ADDRESS.fullmatch(name) is not None


def _is_secret(text: str) -> bool:
    return len(text) >= _LEAST and not is_setting(text)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""


@lru_cache(maxsize=1024)
def _spellings(secret: str) -> tuple[str, ...]:
    """A secret as it stands in plain text, in JSON, in a form's data, in HTML and in Python."""
    as_json = json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]
    # Other writers of JSON escape "/", and Python an apostrophe if quotes are in the text.
    others = *(one.replace("/", "\\/") for one in as_json), secret.replace(" ", "+")
    as_bytes = repr(secret.encode(errors="replace"))[2:-1]
    in_python = repr(secret)[1:-1], repr(f'{secret}"')[1:-2], ascii(secret)[1:-1], as_bytes
    return tuple({secret, *as_json, *others, *in_python, unquote(secret), html.escape(secret)} - {""})


@lru_cache(maxsize=64)
def _pattern(spellings: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(_within_words(one, re.escape(one)) for one in spellings))


@lru_cache(maxsize=64)
def _percent_pattern(secrets: tuple[str, ...]) -> re.Pattern[str]:
    """Secrets, a group each, in URLs: any of their bytes as percent-escapes, which may be escaped again."""
    return re.compile("|".join(f"({_within_words(one, _in_url(one))})" for one in secrets))


def _within_words(secret: str, pattern: str) -> str:
    """A pattern of a secret; a short one is found only where no word goes on."""
    return pattern if len(secret) >= _ANYWHERE else rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"


def _in_url(secret: str) -> str:
    found = ""
    for char in secret:
        escaped = "".join(f"%(?:25)*(?i:{byte:02x})" for byte in char.encode(errors="replace"))
        found += rf"(?:{re.escape(char)}|{escaped}{'|[+]' if char == ' ' else ''})"
    return found


def keep_out_of_logs() -> None:
    """Redact messages of all loggers from now on: libraries log what they are given."""
    if getattr(made := logging.getLogRecordFactory(), "redacts", False):
        return

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit, which the handler reports
            return record
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, None
        return record

    make.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)
