"""A working directory with tiny corpora, and no test that waits for ever."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

from lifelong_moe.training.ranks import supervise
from tests.forked import ForkedProcess
from tests.integration.conftest import pictures
from tests.tiny import write_corpora

__all__ = ["pictures"]
LIMIT_SECONDS = 120


@pytest.fixture(autouse=True)
def single_threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bits are compared at one thread; what a run changes for its process is put back."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(supervise, "TIMEOUT_SECONDS", 30.0)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)  # Lightning turns it on for the process
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Fail instead of waiting."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"over {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked, with all that a test has patched."""
    if torch.cuda.is_available():
        pytest.skip("autograd does not survive a fork once CUDA is there")
    monkeypatch.setattr(supervise, "Popen", ForkedProcess)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the corpora in it and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    return tmp_path
