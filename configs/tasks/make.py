"""Make the questions of the tasks in this folder anew: ``python configs/tasks/make.py`` writes ``arithmetic.jsonl``.

The same numbers on every machine: nothing but Python's generator of random numbers is asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
QUESTIONS = 200
"""A standard error of at most 3.5 points of accuracy."""


def arithmetic() -> Iterator[dict[str, Any]]:
    """Sums and differences of numbers below 100; the wrong results are off by 1, by 10, and by both."""
    draw = random.Random(0)
    for _ in range(QUESTIONS):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        if draw.random() < 0.5:
            question, result = f"{a} + {b}", a + b
        else:
            question, result = f"{max(a, b)} - {min(a, b)}", abs(a - b)
        one, ten = draw.choice((-1, 1)), draw.choice((-10, 10))
        choices = [result, *(abs(result + off) for off in (one, ten, one + ten))]
        # Where a difference is small, two wrong results can be the same.
        while len(set(choices)) < len(choices):
            choices[-1] += 11
        draw.shuffle(choices)
        yield {"question": question, "choices": [str(one) for one in choices], "answer": choices.index(result)}


def main() -> None:
    """Write the questions."""
    lines = "".join(json.dumps(row) + "\n" for row in arithmetic())
    (FOLDER / "arithmetic.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
