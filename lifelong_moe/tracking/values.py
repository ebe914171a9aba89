"""Convert our names and values to ones that MLflow accepts, losing nothing silently."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from lifelong_moe.errors import TryAgainError
from lifelong_moe.redaction import redact

# Limits of MLflow's database schema; longer texts are refused.
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DESCRIPTION_CHARACTERS = 5000
KEY_CHARACTERS = 250
ABSENT_SUFFIX = "_absent"
"""``<key>_absent`` is 1 at each step where ``<key>`` had no finite value, so that a gap in a chart is explained."""

_ILLEGAL = re.compile(r"[^/\w.\- :]")


def clean_key(key: str) -> str:
    """Make a metric, param or tag name that MLflow accepts.

    Args:
        key: Any text; ``/`` separates chart sections in the MLflow UI and is kept.

    Returns:
        The name with illegal characters as ``_``, without empty, ``.`` or ``..`` path segments, at most 250 characters.
    """
    segments = _ILLEGAL.sub("_", key).split("/")
    cleaned = "/".join(segment for segment in segments if segment not in ("", ".", ".."))
    # Cutting can expose a trailing slash, which MLflow refuses.
    return posixpath.normpath(cleaned[:KEY_CHARACTERS]) if cleaned else "_"


def cut(text: str, limit: int) -> str:
    """Shorten a text to MLflow's limit, saying so in the text.

    Args:
        text: Any text.
        limit: Most characters that the result may have; at least 40.

    Returns:
        ``text`` itself if it fits, else its beginning and a marker with the number of characters cut.
    """
    # Before it is cut: half a secret would not be known as one.
    text = redact(text)
    if len(text) <= limit:
        return text
    # The marker names the original length, which does not depend on how long the marker is.
    marker = f"… [cut, {len(text)} characters]"
    return text[: limit - len(marker)] + marker


def flatten_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flatten nested settings to ``a.b.c`` → text, as MLflow's tables and plots need them.

    Numbers are written as plain numbers so that parallel coordinates and scatter plots can use them. A list of
    mappings gets an index per item (``stages.0.tokens``); any other list stays one JSON value.

    Args:
        params: Mappings, sequences and scalars, nested at will.

    Returns:
        Flat, legal keys in the given order; values of at most 6000 characters. If two keys become equal by
        cleaning, the later one gets underscores appended.
    """
    flat: dict[str, str] = {}
    for path, value in _leaves("", params):
        key = clean_key(path)
        # Two keys may become equal by cleaning, and MLflow refuses a second value.
        while key in flat:
            key = key[: KEY_CHARACTERS - 1] + "_" if len(key) < KEY_CHARACTERS else clean_key("_" + key)
        flat[key] = cut(_as_text(value), PARAM_CHARACTERS)
    return flat


def split_finite(
    rows: Iterable[tuple[str, float, int]],
) -> tuple[list[tuple[str, float, int]], list[tuple[str, int]]]:
    """Separate finite points from those that a chart cannot show.

    Args:
        rows: ``(key, value, step)``.

    Returns:
        Rows to log, with legal keys and an ``<key>_absent`` row in place of each non-finite value; and the
        ``(key, step)`` that were replaced.
    """
    kept: list[tuple[str, float, int]] = []
    absent: list[tuple[str, int]] = []
    for key, value, step in rows:
        # MLflow stores infinity as 1.8e308, which makes a chart's axis useless.
        if math.isfinite(value):
            kept.append((clean_key(key), float(value), int(step)))
        else:
            kept.append((clean_key(key + ABSENT_SUFFIX), 1.0, int(step)))
            absent.append((key, int(step)))
    return kept, absent


def status_after(error: BaseException | None) -> str:
    """MLflow's word for how a run ended.

    Args:
        error: What ended it; None if it came to its end.

    Returns:
        ``KILLED`` if somebody stopped it and the same command goes on with it, ``FAILED`` if something has to be
        mended first, else ``FINISHED``.
    """
    if error is None:
        return "FINISHED"
    stopped = isinstance(error, TryAgainError) or not isinstance(error, Exception)  # Ctrl-C is no Exception
    return "KILLED" if stopped else "FAILED"


def _leaves(path: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        children: Iterable[tuple[Any, Any]] = value.items()
    elif _is_list(value) and any(isinstance(item, Mapping) for item in value):
        children = enumerate(value)
    else:
        yield path, value
        return
    for name, child in children:
        yield from _leaves(f"{path}.{name}" if path else str(name), child)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as in YAML: null, true, false
    if _is_list(value) or isinstance(value, Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
