from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from lifelong_moe.retraining.looks import look_at, overlap, template_lines, typical_words

PROSE = (
    "The harbour was quiet in the morning, and nobody had yet come down to the boats.\nShe walked along the wall to "
    "where the old men used to sit, counting the steps as she had done when she was a child."
)
CODE = "for (int i = 0; i < n; ++i) {\n    x[i] += y[i] * (a - b);\n    if (x[i] > m) { m = x[i]; }\n}\n"


def log_lines(number: int, seed: int = 0) -> list[str]:
    """Lines of three templates, with fields drawn at random."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8))

    forms = [
        lambda: f"2026-01-{draw.randint(1, 28):02} INFO user {word()} logged in from {draw.randint(0, 255)}.0.0.1",
        lambda: f"2026-01-{draw.randint(1, 28):02} WARN request {word()} took {draw.randint(100, 999)} ms",
        lambda: f"2026-01-{draw.randint(1, 28):02} ERROR cannot open file {word()} for user {word()}",
    ]
    return [draw.choice(forms)() for _ in range(number)]


def test_logs_of_random_fields_are_machine_written_lines() -> None:
    lines = log_lines(300)
    assert template_lines(lines) == (300, 3)
    looks = look_at(["\n".join(lines[i : i + 10]) for i in range(0, 300, 10)], {"books": [PROSE]})
    assert looks.words.startswith("It looks like machine-written lines (100% of its lines follow 3 templates): ")
    assert (looks.template_lines_fraction, looks.templates) == (1.0, 3)
    assert len(look_at(lines, {}).words) > 0 and look_at(lines, {}).template_lines_fraction == 1.0  # a line a document


def test_prose_and_code_follow_no_templates() -> None:
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, weights=range(400, 0, -1), k=12)) for _ in range(300)]
    followed, _ = template_lines(lines)
    assert followed / 300 < 0.05
    assert template_lines(["}", "    return x", "else:"] * 50) == (0, 0)  # too short to be one
    assert look_at([PROSE], {}).words.startswith("It looks like running text: ")
    assert look_at([CODE], {}).words.startswith("It looks like code or markup: ")
    assert look_at(["3.1 4.15 92 6535 8979\n" * 4], {}).words.startswith("It looks like numbers or encoded data: ")


def test_a_template_is_followed_by_five_lines_of_four_words_and_keeps_two() -> None:
    def lines(number: int, form: str, filler: int = 0) -> list[str]:
        words = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
        return [form.format(words[i], words[i + 300]) for i in range(number)] + ["no template"] * filler

    assert template_lines(lines(5, "user {} logged in")) == (5, 1) and template_lines(
        lines(4, "user {} logged in")
    ) == (0, 0)
    assert template_lines(lines(5, "user {} in")) == (0, 0)  # three words
    assert template_lines(lines(5, "user {} in {}")) == (5, 1)
    assert template_lines(lines(5, "{} {} in 17")) == (0, 0)  # a number is none to keep
    assert template_lines(lines(5, "user {} logged in", 495)) == (5, 1)  # one in a hundred lines
    assert template_lines(lines(5, "user {} logged in", 496)) == (0, 0)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("123abcdefg", "numbers or encoded data"),
        ("1" * 29 + "a" * 71, "mixed text"),
        ("a" * 17 + "...", "code or markup"),
        ("a" * 86 + "." * 14, "running text"),
        ("a" * 8 + "1.", "running text"),
        ("a" * 79 + "1" * 11 + "." * 10, "mixed text"),
        ("\n".join([f"on day {c * 2} it rained" for c in "abcde"] + ["nothing to say"] * 5), "machine-written lines"),
        ("\n".join([f"on day {c * 2} it rained" for c in "abcde"] + ["nothing to say"] * 6), "running text"),
        ("a" * 3999 + "1" * 9_000, "running text"),  # only its beginning is looked at
    ],
)
def test_kinds_of_text_by_their_most_striking_trait(text: str, kind: str) -> None:
    assert look_at([text], {}).words.startswith(f"It looks like {kind}")


def test_four_thousand_characters_of_a_document_are_looked_at() -> None:
    looks = look_at(["a" * 3999 + "11"], {"x": ["b" * 3999 + "a a"]})
    assert looks.digits_fraction == 1 / 4000 and looks.line_characters == 4000
    assert looks.overlap == 0.0  # of two words each: one long, and "1" against "a"


def test_shares_by_hand() -> None:
    looks = look_at(["ab 12!\n\ncd"], {})
    assert looks.letters_fraction == pytest.approx(4 / 7) and looks.digits_fraction == pytest.approx(2 / 7)
    assert looks.punctuation_fraction == pytest.approx(1 / 7)
    assert looks.line_characters == 4.0  # "ab 12!" and "cd"
    assert (looks.nearest, looks.overlap, looks.typical) == (None, None, [])


def test_the_nearest_known_distribution_has_the_most_words_in_common() -> None:
    looks = look_at([PROSE], {"code": [CODE], "books": ["The boats were quiet, and the old men used to come down."]})
    assert looks.nearest == "books" and "overlap most with books" in looks.words
    one, other = Counter("aabc"), Counter("abbd")
    assert overlap(one, other) == pytest.approx(0.25 + 0.25)  # a: least of 2/4 and 1/4; b: of 1/4 and 2/4
    assert overlap(one, one) == 1.0 and overlap(one, Counter("xyz")) == 0.0


def test_typical_words_are_more_frequent_than_before_beyond_chance() -> None:
    new, old = Counter({"the": 100, "whale": 30, "once": 1}), Counter({"the": 100, "tree": 31})
    assert typical_words(new, old) == ["whale"]
    assert typical_words(new, new) == []
    assert typical_words(new, Counter())[:1] != ["once"]


def fightin_words(new: Counter[str], old: Counter[str]) -> set[str]:
    """Words of z > 2 as the paper has it, word by word: eqs. 16 and 20 with a prior of half a word each."""
    vocabulary, found = {*new, *old}, set()
    for word in new:
        odds, variance = [], 0.0
        for counts in (new, old):
            with_prior = {w: counts[w] + 0.5 for w in vocabulary}
            others = sum(number for w, number in with_prior.items() if w != word)
            odds.append(math.log(with_prior[word] / others))
            variance += 1 / with_prior[word]
        if (odds[0] - odds[1]) / math.sqrt(variance) > 2:
            found.add(word)
    return found


def test_typical_words_are_those_of_the_paper() -> None:
    """For all small counts of a word and of one or two others."""
    for x, y, others, most in itertools.product(range(12), range(3), range(9), (0, 1, 4)):
        new, old = Counter({"x": x, "a": others // 3}), Counter({"x": y, "a": others % 3, "b": most})
        new, old = +new, +old
        if len({*new, *old}) > 1:  # of a single word there is nothing to hold it against
            assert set(typical_words(new, old)) == fightin_words(new, old), (new, old)


def test_the_most_typical_word_comes_first_and_of_equals_the_first_in_the_alphabet() -> None:
    new = Counter({"some": 30, "much": 90, "more": 90, "the": 500})
    assert typical_words(new, Counter({"the": 500})) == ["more", "much", "some"]
    assert look_at(["a b c d e f g " * 50], {"x": ["z " * 400]}).typical == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("texts", [[], [""], ["   \n\t"], ["\x00"], ["\u2028"]])
def test_text_without_anything_to_see_is_described_all_the_same(texts: list[str]) -> None:
    looks = look_at(texts, {"books": [PROSE]})
    assert looks.words.startswith("It looks like ") and 0 <= looks.punctuation_fraction <= 1
