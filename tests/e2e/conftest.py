"""A working directory as a user has it, and the command line in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipelines.cli import app, exit_code
from tests.known_stages import known_stages, use_known_stages
from tests.pictures import draw_once
from tests.tiny import tiny_config, train, write_config, write_corpora

__all__ = ["known_stages"]


@dataclass(frozen=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is drawn once; what is in them is tested elsewhere."""
    draw_once(monkeypatch)


@pytest.fixture(autouse=True)
def single_threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a run changes for its process is put back."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``lifelong-moe ARGUMENTS`` in this process."""

    def call(*arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["lifelong-moe", *arguments])
        capsys.readouterr()
        code = exit_code(app)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with three corpora and ``tiny.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    write_config(tiny_config())
    return tmp_path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which ``tiny`` and ``naive`` have been run."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        write_corpora(root)
        write_config(tiny_config())
        train()
        train("tiny.yaml", "run=naive", "method=sequential")
    return root


@pytest.fixture
def trained(trained_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That directory as the current one; tests only read in it."""
    monkeypatch.chdir(trained_once)
    return trained_once
