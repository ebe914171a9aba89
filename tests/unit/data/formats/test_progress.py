"""How far reading has come, in words, and not a word where nobody listens."""

import pytest

from lifelong_moe.data.formats import progress
from lifelong_moe.data.formats.progress import sentence, telling, told


def test_a_sentence() -> None:
    assert sentence("reading a", 120_000_000, 400_000_000, 15) == "reading a: 120 of 400 MB, 8.0 MB/s, 35 s left"
    # A packed file holds more than its size says.
    assert sentence("reading a", 500_000_000, 400_000_000, 10) == "reading a: 500 of 500 MB, 50.0 MB/s, 0 s left"
    assert sentence("reading a", 0, 0, 0) == "reading a: 0 of 0 MB, 0.0 MB/s"


def test_who_listens_hears_and_gets_all_things(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(progress, "EACH_SECONDS", 0.0)
    assert list(told([1, 2], "nobody hears", 3, int)) == [1, 2]
    with telling(heard.append):
        assert list(told([1_000_000, 2_000_000], "reading", 4_000_000, int)) == [1_000_000, 2_000_000]
    assert [one.partition(" MB")[0] for one in heard] == ["reading: 1 of 4", "reading: 3 of 4"]
    assert list(told([1], "nobody hears", 1, int)) == [1] and len(heard) == 2
