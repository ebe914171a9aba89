"""The pages' tables are what the JSON of the runs says."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from scipy.stats import t

from lifelong_moe.storage.keys import content_key
from tests.benchmarks import corpora

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("make_tables")


def test_pages_hold_what_the_json_says(maker: ModuleType) -> None:
    for page in maker.pages():
        text = page.read_text(encoding="utf-8")
        assert maker.with_tables(text) == text, f"{page.name}: run PYTHONPATH=$PWD python docs/make_tables.py"


def test_pictures_show_what_the_json_says_and_stand_in_a_page(maker: ModuleType) -> None:
    shown = importlib.import_module("make_pictures").pictures()
    for path, data in shown.items():
        with Image.open(ROOT / "docs" / path) as picture:
            key = picture.info.get("Source")
        assert key == content_key(data), f"{path}: run PYTHONPATH=$PWD python docs/make_pictures.py"
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    drawn = {path.name for path in (ROOT / "docs/results").glob("*.png")}
    assert drawn == {Path(path).name for path in shown} and all(f"results/{name})" in pages for name in drawn)


def test_every_table_that_is_made_stands_in_one_page(maker: ModuleType) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in maker.pages())
    begun = re.findall(r"^<!-- table: (.+?) -->$", text, re.MULTILINE)
    assert sorted(begun) == sorted(maker.TABLES)
    assert text.count("<!-- end -->") == len(begun)


def test_no_numbers_stand_in_a_table_that_is_not_made(maker: ModuleType) -> None:
    for page in maker.pages():
        rest = maker.TABLE.sub("", page.read_text(encoding="utf-8"))
        assert not re.findall(r"^\|.*---:.*\|$", rest, re.MULTILINE), (
            f"{page.name}: a column to the right is of numbers"
        )


def test_a_changed_number_is_noticed(maker: ModuleType) -> None:
    page = ROOT / "docs/results.md"
    text = page.read_text(encoding="utf-8")
    changed = text.replace("2.828 ± 0.060", "2.728 ± 0.060", 1)
    assert changed != text and maker.with_tables(changed) == text


def test_an_arm_is_the_mean_of_its_seeds_with_half_of_a_t_interval() -> None:
    arms = json.loads((ROOT / "docs/results/bench.json").read_text(encoding="utf-8"))["arms"]
    runs = next(arm["runs"] for arm in arms if arm["name"] == "bundles")
    found = [run["numbers"]["final_mean_bits_per_byte"] for run in runs]
    half = t.ppf(0.975, 2) * statistics.stdev(found) / 3**0.5
    row = f"{statistics.fmean(found):.3f} ± {half:.3f}"
    lines = (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
    assert row in next(line for line in lines if line.startswith("| `bundles` | 3 |"))


def test_files_of_text_are_compared_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gzip.compress('{"text": "é", "source": "s"}\n{"text": "ab", "source": "s"}\n'.encode(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    known = {"file": "a.jsonl.gz", "documents": 2, "text_bytes": 4, "sha256": hashlib.sha256(raw).hexdigest()}
    monkeypatch.setenv("LIFELONG_DATA", str(tmp_path))
    monkeypatch.setattr(corpora, "KNOWN", tmp_path / "corpora.json")
    for changed, code in (({}, 0), ({"text_bytes": 3}, 1), ({"file": "b.jsonl.gz"}, 1)):
        corpora.KNOWN.write_text(json.dumps({"files": [known | changed]}), encoding="utf-8")
        assert corpora.main() == code
