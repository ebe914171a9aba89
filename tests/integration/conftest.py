"""A working directory with tiny corpora, one thread, and signals put back."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.known_stages import known_stages, use_known_stages
from tests.pictures import draw_once
from tests.retrain_lab import arrive, make_base, tick
from tests.tiny import write_corpora

__all__ = ["known_stages"]


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is drawn once; what is in them is tested elsewhere."""
    draw_once(monkeypatch)


@pytest.fixture(autouse=True)
def single_threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bits are compared at one thread; what a run changes for its process is put back."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)  # Lightning turns it on for the process
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture(scope="session")
def retraining_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an inbox beside it, trained once; to be copied."""
    root = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        make_base(root)
    return root


@pytest.fixture(scope="session")
def grown(retraining_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a new kind of text was promoted, its weights as an undisturbed tick leaves them."""
    root = tmp_path_factory.mktemp("grown") / "lab"
    shutil.copytree(retraining_base, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        arrive("sea")
        assert tick()["outcome"] == "promoted"
    return root


@pytest.fixture
def after_growth(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that to work in."""
    root = tmp_path / "grown"
    shutil.copytree(grown, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with ``fruit.jsonl``, ``code.jsonl`` and ``sea.jsonl`` in it and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    return tmp_path
