"""Whatever is named as a file, nothing is waited for that never comes, and nothing endless is read."""

from __future__ import annotations

import os
import socket
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lifelong_moe.storage.opening import read_given, read_up_to
from pipelines.cli import app, exit_code
from tests.retrain_lab import write_retraining
from tests.tiny import tiny_config, write_config, write_corpora

SECONDS = 20.0
Command = Callable[..., str]


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    write_config(tiny_config())
    return tmp_path


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that is refused in one line before anything is written; returns the line."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["lifelong-moe", *arguments])
        codes: list[int] = []
        # In a thread that is given up: a command that waits for a FIFO waits for ever.
        thread = threading.Thread(target=lambda: codes.append(exit_code(app)), daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert not thread.is_alive(), "it waits"
        errors = capsys.readouterr().err.splitlines()
        assert codes == [2] and len(errors) == 1, errors
        assert not Path("mlruns").exists()
        return errors[0]

    return call


def make(kind: str, name: str) -> None:
    path = Path(name)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to("/dev/zero")


KINDS = ["FIFO", "directory", "socket", "device", "loop", "sparse"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration(kind: str, refused: Command) -> None:
    make(kind, "given.yaml")
    for command in ("plan", "compare", "retrain"):
        assert "given.yaml" in refused(command, "given.yaml")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["compare", "retrain"])
def test_a_base_which_a_file_names(kind: str, command: str, refused: Command) -> None:
    make(kind, "base.yaml")
    write_retraining(base="base.yaml")
    Path("compare.yaml").write_text(
        yaml.safe_dump({"compare": "a", "base": "base.yaml", "arms": {"a": []}}), encoding="utf-8"
    )
    assert "base.yaml" in refused(command, f"{command}.yaml")


def test_a_base_is_no_pipe_even_one_that_is_written_to(refused: Command) -> None:
    write_retraining(base="/dev/stdin")
    reading, writing = os.pipe()
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert "/dev/stdin: is a FIFO, not a regular file" in refused("retrain", "retrain.yaml")
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan(kind: str, refused: Command) -> None:
    write_retraining()
    make(kind, "plan.json")
    assert "plan.json: not a plan of lifelong-moe retrain" in refused("retrain", "retrain.yaml", "--plan", "plan.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "\x00", "9" * 5000])
def test_a_plan_that_is_none(text: str, refused: Command) -> None:
    write_retraining()
    Path("plan.json").write_text(text)
    assert "plan.json: not a plan of lifelong-moe retrain" in refused("retrain", "retrain.yaml", "--plan", "plan.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text(kind: str, refused: Command) -> None:
    make(kind, "text.txt")
    line = refused("inspect", "tiny", "--text-file", "text.txt")
    # An empty text is one, so a FIFO into which nobody writes gets as far as the run, which is not there.
    assert "text.txt" in line or kind == "FIFO"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["files", "heldout_files", "tokenizer"])
def test_text_and_tokenizer_of_a_configuration(kind: str, key: str, refused: Command) -> None:
    name = "given.json" if key == "tokenizer" else "given.jsonl"
    make(kind, name)
    config = tiny_config()
    if key == "tokenizer":
        config["tokenizer"] = {"file": name}
    else:
        config["distributions"]["fruit"][key] = name
    write_config(config)
    assert name in refused("plan", "tiny.yaml")


def test_a_pipe_into_which_somebody_writes_is_read_to_its_end_and_an_endless_one_to_the_limit() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"text")
    assert read_given(Path(f"/dev/fd/{reading}"), 4) == (b"text", 0o600)
    os.close(reading)
    reading, writing = os.pipe()

    def write() -> None:
        try:
            while True:
                os.write(writing, b"a" * 1000)
        except BrokenPipeError:
            os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(OSError, match="longer than 100 bytes"):
        read_given(Path(f"/dev/fd/{reading}"), 100)
    os.close(reading)
    thread.join()


def test_reading_takes_no_more_memory_than_the_file_has(tmp_path: Path) -> None:
    """Python takes as much as it is asked to read: 4 GiB for each file of an inbox."""
    (tmp_path / "small").write_bytes(b"text")
    with (tmp_path / "small").open("rb") as file:
        tracemalloc.start()
        try:
            assert read_up_to(file, 256 << 20) == b"text"
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("stated", [0, 3, 4, 9])
def test_what_a_file_states_of_its_size_may_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: int
) -> None:
    (tmp_path / "grows").write_bytes(b"text")
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0,) * 6 + (stated,) + (0,) * 3))
    for most, read in ((9, b"text"), (4, b"text"), (3, b"text"), (2, b"tex")):
        with (tmp_path / "grows").open("rb") as file:
            assert read_up_to(file, most) == read
