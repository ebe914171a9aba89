"""What a terminal, a pipe or an encoding does to what is printed: it ends no work and cuts no number."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from pipelines import cli as command_line
from pipelines import commands
from pipelines.shared import output
from pipelines.shared.tables import show
from tests.e2e.conftest import Cli
from tests.tiny import tiny_config, write_config

LIFELONG = [sys.executable, "-m", "pipelines.cli"]
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def copied(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two trained runs, where a test may write."""
    monkeypatch.chdir(shutil.copytree(trained_once, tmp_path / "lab"))
    return tmp_path / "lab"


@contextmanager
def encoded(encoding: str, path: Path) -> Iterator[TextIO]:
    """Standard output as a process gets it that is started with this encoding, into a file."""
    number = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    with open(number, "w", encoding=encoding, closefd=False) as like:
        yield output.stream(number, like, "replace")
    os.close(number)


def test_training_outlives_the_reader_of_its_output(lab: Path) -> None:
    """``run tiny.yaml 2>&1 | head -1``."""
    write_config(tiny_config(("fruit",), tracking={"enabled": False}))
    run = subprocess.Popen(
        [*LIFELONG, "run", "tiny.yaml"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
    )
    assert run.stdout is not None and run.stdout.readline()
    run.stdout.close()
    assert run.wait() == 0
    assert len(list(lab.glob("mlruns/stages/fruit-*/manifest.json"))) == 1
    assert json.loads((lab / "mlruns/runs/tiny/report.json").read_text(encoding="utf-8"))["run"] == "tiny"


def test_standard_streams_that_are_closed(trained: Path) -> None:
    """``>&-``; what is opened next must not take their numbers, or all that is printed would go into it."""
    code = "from pipelines.shared import output; output.make_robust(); raise SystemExit(open('tiny.yaml').fileno() < 3)"
    for command in ("-m pipelines.cli report tiny naive --json", f'-c "{code}"'):
        closed = f"exec {sys.executable} {command} <&- >&- 2>&-"
        assert subprocess.run(["sh", "-c", closed], env=environment(), check=False).returncode == 0, command


def test_only_a_reader_that_is_gone_is_done_without() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = output.stream(writing, None, "replace")
    Console(file=stream).print("apple")
    print("pear", file=stream, flush=True)
    os.close(writing)
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full, pytest.raises(OSError) as caught:
            print("plum", file=output.stream(full.fileno(), None, "replace"), flush=True)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_encoding_will_do(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    (tmp_path / "grüße.jsonl").write_text('{"text": "apple pear"}\n', encoding="utf-8")
    commands = (
        ("plan", "tiny.yaml"),
        ("report", "tiny", "naive"),
        ("lineage", "tiny"),
        ("inspect", "tiny", "--tokens", "64"),
        ("inspect", "tiny", "--text", "apple – दिन"),
        ("generate", "tiny", "दिन", "--max-new-tokens", "4"),
        ("evaluate", "tiny", "--data", str(tmp_path / "gr*.jsonl")),
    )
    for arguments in commands:
        for json_too in ((), ("--json",)):
            with encoded(encoding, tmp_path / "out") as stream, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                patch.setattr(sys, "argv", ["lifelong-moe", *arguments, *json_too])
                code = command_line.exit_code(command_line.app)
                stream.flush()
            assert code == 0, (arguments, json_too)
            printed = (tmp_path / "out").read_bytes().decode(encoding)
            if json_too:
                answer = json.loads(printed)
                assert arguments[0] != "generate" or answer["prompt"] == "दिन"


def test_the_version_is_said(cli: Cli) -> None:
    result = cli("--version")
    assert result.code == 0 and result.out == f"lifelong-moe {version('lifelong-moe')}\n"


def words(text: str) -> set[str]:
    """What stands between spaces and a table's lines."""
    return set(re.split(r"[\s│┃]+", text))


def test_no_number_is_cut_on_a_narrow_terminal(copied: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        ("plan", "tiny.yaml"),
        ("report", "tiny", "naive"),
        ("status", "tiny"),
        ("inspect", "tiny", "--tokens", "64"),
        ("inspect", "tiny", "--text", "apple pear"),
    )
    for arguments in asked:
        printed = {}
        for width in (400, 80, 60):
            monkeypatch.setattr(commands, "console", lambda as_json, width=width: Console(width=width))
            result = cli(*arguments)
            assert result.code == 0 and max(map(cell_len, result.out.splitlines())) <= width
            printed[width] = {word for word in words(result.out) if any(map(str.isdigit, word)) and "/" not in word}
        assert len(printed[400]) >= 2 and printed[80] == printed[60] == printed[400], arguments


def table(*rows: tuple[str, ...]) -> list[str]:
    """Such a table on a terminal of 31 characters, its lines without colours and space at their ends."""
    made = Table("name", "text", "n", title="T")
    for row in rows:
        made.add_row(*row, style="dim")
    file = io.StringIO()
    show(Console(file=file, width=31), made)
    return [line.strip() for line in file.getvalue().splitlines()]


def test_a_title_is_not_folded_at_the_width_of_its_table() -> None:
    made, file = Table("a", title="a title of several words"), io.StringIO()
    made.add_row("1")
    show(Console(file=file, width=31), made)
    assert file.getvalue().splitlines()[0] == "a title of several words"


def test_a_table_fits_is_wrapped_or_goes_on_below() -> None:
    """Columns as wide as 4, 12 and 9 characters take 3 more each, and 1: 35. In 31 there are 8 left for the middle."""
    assert "│ a    │ one two │ 1 │" in table(("a", "one two", "1"))
    wrapped = table(("a", "one two four", "1,000,000"))
    assert wrapped[0] == "T"
    assert wrapped[-3:-1] == ["│ a    │ one two  │ 1,000,000 │", "│      │ four     │           │"]
    below = table(("a", "incomprehensible", "1,000,000"))
    assert below[0] == "T" and below.count("T") == 1
    assert "│ a    │ incomprehensible │" in below and "│ a    │ 1,000,000 │" in below
    huge = "".join(table(("a", "9" * 40, "1")))
    assert huge.count("9") == 40 and "…" not in huge
