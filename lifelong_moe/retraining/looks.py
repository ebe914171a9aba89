"""What kind of text a batch looks like: a sentence for the operator and numbers for a chart. It decides nothing.

A model learns logs with random fields as well as prose, and gains by it; whether that is wanted is the operator's
decision. So the plan says what would be learned.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LONGEST = 4000
"""Characters read of each document, from its beginning."""
# Shorter lines repeat in any text.
LEAST_WORDS = 4
"""Fewest words of a line that can follow a template."""
LEAST_LINES = 5
"""Fewest lines that a frequent word, and a template, must occur in; and at least one in a hundred."""
TYPICAL = 5
"""Number of typical words to name."""

_WORD = re.compile(r"\w+", re.UNICODE)
_TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Traits of texts. Fractions are of characters other than white space, except ``template_lines_fraction``."""

    letters_fraction: float
    digits_fraction: float
    punctuation_fraction: float
    """Punctuation and symbols: all that is neither letter nor digit."""
    line_characters: float
    """Mean length of a line that is not blank."""
    template_lines_fraction: float
    """Share of lines that follow a template: frequent words in fixed places, the others vary."""
    templates: int
    """Number of templates that those lines follow."""
    nearest: str | None
    """Known distribution with the largest overlap of word frequencies; None if there is none."""
    overlap: float | None
    """That overlap, 0 to 1; see :func:`overlap`."""
    typical: list[str]
    """Words, digits and signs most over-represented against known text, the strongest first."""
    words: str
    """The traits as a sentence."""


def look_at(new: Sequence[str], old: Mapping[str, Sequence[str]]) -> Looks:
    """Describe texts, and compare their words with those of known distributions.

    Args:
        new: Documents.
        old: Documents of each known distribution; may be empty.
    """
    new = [text[:LONGEST] for text in new]
    characters = Counter(character for text in new for character in text if not character.isspace())
    total = max(1, characters.total())
    letters = sum(n for c, n in characters.items() if c.isalpha()) / total
    digits = sum(n for c, n in characters.items() if c.isdigit()) / total
    lines = [line for text in new for line in text.splitlines() if line.strip()]
    followed, templates = template_lines(lines)
    counts = _tokens(new)
    known = {name: _tokens(text[:LONGEST] for text in texts) for name, texts in old.items()}
    overlaps = {name: overlap(counts, other) for name, other in known.items()}
    nearest = max(overlaps, key=lambda name: overlaps[name], default=None)
    looks = Looks(
        letters_fraction=letters,
        digits_fraction=digits,
        # The rest, which floating point may leave a hair below 0.
        punctuation_fraction=max(0.0, 1 - letters - digits) if characters else 0.0,
        line_characters=sum(map(len, lines)) / max(1, len(lines)),
        template_lines_fraction=followed / max(1, len(lines)),
        templates=templates,
        nearest=nearest,
        overlap=None if nearest is None else overlaps[nearest],
        typical=typical_words(counts, sum(known.values(), Counter()))[:TYPICAL],
        words="",
    )
    return dataclasses.replace(looks, words=_sentence(looks))


def template_lines(lines: Sequence[str]) -> tuple[int, int]:
    """Count the lines that follow templates, and the templates.

    A line's template is its sequence of words with rare words and numbers replaced by blanks. It counts if it keeps at
    least two words and at least ``LEAST_LINES`` lines, and one in a hundred, follow it.

    Source:
        Vaarandi 2003, A Data Clustering Algorithm for Mining Patterns from Event Logs: frequent words in fixed places.
        There each place has its own frequent words; here a word is frequent anywhere, since fields vary in number.
    """
    least = max(LEAST_LINES, math.ceil(len(lines) / 100))
    # Digits within words go as well, so that "worker-17" and "worker-3" are one word.
    split = [[re.sub(r"\d+", "0", word) for word in _WORD.findall(line)] for line in lines]
    frequency = Counter(word for words in split for word in set(words))
    followers: Counter[tuple[str, ...]] = Counter()
    for words in split:
        kept = tuple(word if frequency[word] >= least and word != "0" else "" for word in words)
        if len(kept) >= LEAST_WORDS and sum(map(bool, kept)) >= 2:
            followers[kept] += 1
    found = [number for number in followers.values() if number >= least]
    return sum(found), len(found)


def overlap(one: Counter[str], other: Counter[str]) -> float:
    """Sum over words of the smaller of two relative frequencies: 1 for the same frequencies, 0 for no common word."""
    totals = max(1, one.total()), max(1, other.total())
    return sum(min(count / totals[0], other[word] / totals[1]) for word, count in one.items())


def typical_words(new: Counter[str], old: Counter[str]) -> list[str]:
    """Words that are more frequent in new text than in old with z > 2, by descending z.

    Source:
        Monroe, Colaresi and Quinn 2008, Fightin' Words, eqs. 16 and 22: log-odds with a prior; here half a word each.
    """
    scores = {}
    vocabulary = len(new.keys() | old.keys())
    n, m = new.total() + vocabulary / 2, old.total() + vocabulary / 2
    for word, count in new.items():
        a, b = count + 0.5, old[word] + 0.5
        odds = math.log(a / max(n - a, 0.5)) - math.log(b / max(m - b, 0.5))
        scores[word] = odds / math.sqrt(1 / a + 1 / b)
    return sorted((word for word in scores if scores[word] > 2), key=lambda word: (-scores[word], word))


def _tokens(texts: Iterable[str]) -> Counter[str]:
    """Counts of lower-case words, single digits and single signs."""
    return Counter(token for text in texts for token in _TOKEN.findall(text.lower()))


def _sentence(looks: Looks) -> str:
    parts = [
        f"{looks.letters_fraction:.0%} letters, {looks.digits_fraction:.0%} digits, "
        f"{looks.punctuation_fraction:.0%} punctuation",
        f"lines of {looks.line_characters:.0f} characters",
    ]
    if looks.nearest is not None and looks.overlap is not None:
        parts.append(f"word frequencies overlap most with {looks.nearest} ({looks.overlap:.0%})")
    if looks.typical:
        parts.append(f"typical against known text: {' '.join(looks.typical)}")
    return f"It looks like {_kind(looks)}: {'; '.join(parts)}."


def _kind(looks: Looks) -> str:
    """Name of the most striking trait."""
    # Round numbers, since they choose words and decide nothing. Templates first: logs are full of digits too.
    if looks.template_lines_fraction >= 0.5:
        many = f"{looks.templates} templates" if looks.templates > 1 else "one template"
        return f"machine-written lines ({looks.template_lines_fraction:.0%} of its lines follow {many})"
    if looks.digits_fraction >= 0.3:
        return "numbers or encoded data"
    if looks.punctuation_fraction >= 0.15:
        return "code or markup"
    return "running text" if looks.letters_fraction >= 0.8 else "mixed text"
