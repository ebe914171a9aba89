"""Globs find what those of the standard library find, and end where links lead round."""

from __future__ import annotations

import glob
import os
import random
from pathlib import Path

import pytest

from lifelong_moe.data.formats.globs import matching

PATTERNS = ["**", "**/*", "**/*.md", "*/**/*.md", "a/**", "a/**/b/**/*.md", "**/**/*.md", "**/a/*", "a*/**/x.md",
            "a/x.md", "./**/*.md", "a/**/[ax].md", "**/nosuch/**", "[ab]/**/*", "a**/*.md"]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders five deep of few names, with hidden ones, files of which some are called like patterns."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for _ in range(60):
        folder = Path(*draw.choices(["a", "b", "c[1]", ".h"], k=draw.randint(1, 5)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / draw.choice(["x.md", "y.txt", ".z.md", "*.md"])).touch()
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_files_are_those_of_the_standard_library(tree: Path, pattern: str, absolute: bool) -> None:
    pattern = os.path.join(glob.escape(str(tree)), pattern) if absolute else pattern
    expected = {path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path)}
    assert {path for path in matching(pattern) if os.path.isfile(path)} == expected
    assert expected or "nosuch" in pattern


def test_links_that_lead_round_and_across_are_entered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path(f"top/f{i}") for i in range(8)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "x.md").touch()
        (folder / "up").symlink_to("..")
        (folder / "again").symlink_to("../..")
        for i in range(8):
            (folder / f"to{i}").symlink_to(f"../f{i}")
    Path("top/near").symlink_to("f3")
    found = sorted(matching("top/**/*.md"))
    # By the way through the fewest folders.
    assert found == [f"top/f{i}/x.md" for i in range(8)]
    assert sorted(matching("**/near/*.md")) == ["top/near/x.md"]
