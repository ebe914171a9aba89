"""A folder of somebody's own text: what the commands say became of each file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from tests.tiny import VOCABULARIES, tiny_config, write_config


def write_folder(folder: Path, vocabulary: str, number: int, kinds: tuple[str, ...] = ("md", "txt")) -> None:
    """Files of some hundred words, no two alike."""
    folder.mkdir(parents=True)
    draw, words = random.Random(vocabulary), VOCABULARIES[vocabulary].split()
    for i in range(number):
        text = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(12))
        text = f"<p>{i} {text}</p>" if kinds[i % len(kinds)] == "html" else f"{i} {text}"
        (folder / f"{i}.{kinds[i % len(kinds)]}").write_text(text, encoding="utf-8")


def test_what_became_of_files_is_counted_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("notes"), "fruit", 12, ("md", "html", "py"))
    Path("notes/old.txt").write_bytes("Größe".encode("cp1252"))
    Path("notes/empty.txt").touch()
    for name in ("a", "b", "c", "d"):
        Path(f"notes/{name}.png").write_bytes(b"\x89PNG")
    config = tiny_config(("fruit",))
    config["distributions"]["fruit"] = {"files": ["notes/*.*"], "heldout_fraction": 0.1}
    write_config(config)
    said = "fruit: 18 files: 12 used, 1 empty, 1 neither UTF-8 nor UTF-16, 4 of a kind that is not read"
    for command in ("prepare", "plan"):
        result = cli(command, "tiny.yaml")
        assert result.code == 0 and said in result.out, result.err
        assert "neither UTF-8 nor UTF-16: notes/old.txt: left out; distributions.fruit.encoding=cp1252" in result.out
        assert "notes/a.png, notes/b.png, notes/c.png and 1 more: left out" in result.out
        assert "What became of each file: data/cache/files/tiny.json" in result.out
    assert not Path("mlruns").exists()
    listed = json.loads(Path("data/cache/files/tiny.json").read_text())["fruit"]
    assert len(listed) == 18 and listed[0] == {"file": "notes/0.md", "outcome": "used", "documents": 1, "note": ""}
    Path("notes/old.txt").chmod(0o600)
    result = cli("plan", "tiny.yaml", "distributions.fruit.encoding=cp1252", "--json")
    assert json.loads(result.out)["files"]["fruit"]["used"] == 13
    # Private text, hence a private list.
    assert Path("data/cache/files/tiny.json").stat().st_mode & 0o077 == 0
    # Of two equal files the first by name counts.
    shutil.copy("notes/0.md", "notes/zz.md")
    result = cli("plan", "tiny.yaml")
    assert "fruit: duplicate: notes/zz.md: left out; other files have the same text" in result.out
