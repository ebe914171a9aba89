"""Machines are shared: what is made of somebody's text is as private as that text, and never for everybody."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lifelong_moe.config.data import TokenizerConfig
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.tokens.tokenizer import trained_tokenizer
from lifelong_moe.storage.modes import SHARED, as_private_as, folder_mode, make_folder
from pipelines.cli import main
from tests.e2e.conftest import Cli
from tests.retrain_lab import arrive, make_base, tick

pytestmark = pytest.mark.xdist_group("modes")  # one process trains what most of them look at


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run and a dry tick, by a user whose files others may read, of text of which some is private."""
    root, umask, threads = tmp_path_factory.mktemp("modes"), os.umask(0o022), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setenv("TOKENIZERS_PARALLELISM", "false")
            patch.setattr("tests.retrain_lab.write_corpora", write_corpora)
            make_base(root, stage_defaults={"tokens": 256}, evaluate={"tokens": 600, "keep_heldout": True})
            arrive("sea", "a.jsonl").chmod(0o600)
            arrive("sea", "b.jsonl", seed=78).chmod(0o644)
            assert tick(dry_run=True)["outcome"] == "planned"
        yield root
    finally:
        os.umask(umask)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def write_corpora(root: Path) -> None:
    from tests import tiny

    tiny.write_corpora(root)
    (root / "code.jsonl").chmod(0o600)


def modes(*folders: Path) -> dict[str, int]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    assert paths
    return {str(path): stat.S_IMODE(path.lstat().st_mode) for path in paths}


def test_nothing_is_for_everybody(lab: Path) -> None:
    wide = {path: oct(mode) for path, mode in modes(lab / "mlruns", lab / "data").items() if mode & 0o027}
    assert wide == {}


def test_a_private_inbox_makes_a_private_batch(lab: Path) -> None:
    """Of two files one is private, so that their batch is."""
    assert set(modes(lab / "mlruns" / "batches").values()) == {0o600, 0o700}


def test_private_text_makes_private_tokens_and_held_out_text(lab: Path) -> None:
    """That of ``code`` and of the batch is private, that of ``fruit`` is not."""
    heldout = modes(lab / "mlruns" / "heldout")
    assert sorted(heldout.values()) == [0o600, 0o640]
    (private,) = (Path(path) for path, mode in heldout.items() if mode == 0o600)
    assert "lambda" in private.read_text(encoding="utf-8")  # a word of code
    tokens = modes(lab / "data" / "cache" / "tokens")
    folders = [mode for path, mode in tokens.items() if Path(path).is_dir()]
    assert sorted(set(folders)) == [0o700, 0o750] and folders.count(0o750) == 2  # training and held-out text of fruit
    for path, mode in tokens.items():
        if Path(path).is_file():
            assert mode == (0o600 if tokens[str(Path(path).parent)] == 0o700 else 0o640)


def test_text_that_arrives_again_is_as_private_as_then(tmp_path: Path) -> None:
    batches, documents = BatchStore(tmp_path), [Document("one", "a"), Document("two", "b")]
    batch = batches.add(documents, [], 0o600)
    batches.remove_text(batch)
    # What is left names their sources.
    assert set(modes(tmp_path / "batches").values()) == {0o600, 0o700}
    batches.add(documents, [], 0o600)
    assert stat.S_IMODE(batches.path(batch).stat().st_mode) == 0o600


@pytest.mark.parametrize(("source", "ours"), [(0o600, 0o600), (0o644, 0o640)])
def test_what_inspect_makes_of_a_text_is_as_private(
    source: int, ours: int, trained: Path, tmp_path: Path, cli: Cli
) -> None:
    text, page, table = tmp_path / "text.txt", tmp_path / "page.html", tmp_path / "table.parquet"
    text.write_text("apple pear")
    text.chmod(source)
    with wide_umask():
        result = cli("inspect", "tiny", "--text-file", str(text), "--html", str(page), "--save", str(table))
    assert result.code == 0, result.err
    assert {stat.S_IMODE(path.stat().st_mode) for path in (page, table)} == {ours}


@pytest.mark.parametrize(("source", "ours"), [(0o600, 0o600), (0o644, 0o640)])
def test_what_inspect_makes_of_held_out_text_is_as_private(
    source: int, ours: int, trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    work, table = tmp_path / "work", tmp_path / "table.parquet"
    shutil.copytree(trained_once, work)
    monkeypatch.chdir(work)
    Path("fruit.jsonl").chmod(0o644)
    Path("code.jsonl").chmod(source)
    Path("mlruns/runs/tiny/inspection.json").write_bytes(b"\xff\xfe")  # no text, so not known: it is written anew
    with wide_umask():
        assert cli("inspect", "tiny", "--save", str(table)).code == 0
    made = [table, *Path("mlruns/runs/tiny").glob("inspection*.json")]
    assert len(made) == 3 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {ours}


def test_a_tokenizer_of_private_text_is_private(tmp_path: Path) -> None:
    documents = [Document("some words", "a")]
    with wide_umask():
        for mode in (0o600, 0o640):
            corpus = Corpus("fruit", documents, [], f"{mode:064}", "1" * 64, mode=mode)
            trained_tokenizer(TokenizerConfig(vocab_size=260), corpus, tmp_path)
    found = modes(tmp_path / "tokenizers")
    assert sorted(mode for path, mode in found.items() if path.endswith(".json")) == [0o600, 0o640]


@contextmanager
def wide_umask() -> Iterator[None]:
    """That of a user whose files others may read."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("source", "ours"), [(0o600, 0o600), (0o644, 0o640), (0o640, 0o640), (0o400, 0o600), (0o777, 0o640), (0o604, 0o600)]
)
def test_a_copy_is_as_private_as_its_source(source: int, ours: int) -> None:
    assert as_private_as(source) == ours
    assert folder_mode(ours) == (0o750 if ours & 0o040 else 0o700)


def test_what_libraries_write_is_not_for_everybody_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's database and artifacts have whatever permissions the umask leaves."""
    monkeypatch.setattr("pipelines.cli.output.make_robust", lambda: None)
    monkeypatch.setattr("pipelines.cli.threads.configure", lambda: None)
    monkeypatch.setattr("pipelines.cli.exit_code", lambda _: 0)
    before = os.umask(0o022)
    try:
        with pytest.raises(SystemExit):
            main()
        assert os.umask(0) == 0o027
    finally:
        os.umask(before)


def test_folders_are_entered_by_those_who_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {0o750}
    shutil.rmtree(tmp_path / "a")
    assert folder_mode(SHARED) == 0o750
