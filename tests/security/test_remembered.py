"""What was verified is not read again while nothing has touched it, and is where a store is somebody else's."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage import remembered, verified
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.signing import SigningKeys
from lifelong_moe.store.pointer import POINTER, open_pointer, point_to
from lifelong_moe.store.stages import WEIGHTS, StageStore
from tests.records import METRICS, made_record

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def small_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test count as large, and as old as they need to be."""
    monkeypatch.setattr(remembered, "LEAST_BYTES", 0)
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", -60.0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed, since the list was cleared."""
    names: list[str] = []
    compare: Callable[..., None] = verified._compare

    def noted(path: Path, *args: Any) -> None:
        names.append(path.name)
        compare(path, *args)

    monkeypatch.setattr(verified, "_compare", noted)
    return names


@pytest.fixture
def root(tmp_path: Path, hashed: list[str]) -> Path:
    """A store with one stage, whose files are remembered."""
    root = tmp_path / "mlruns"
    StageStore(root).commit(made_record(KEY), METRICS, {"w": torch.arange(3.0)})
    hashed.clear()
    return root


def weights(root: Path) -> Path:
    (path,) = root.glob(f"stages/*/{WEIGHTS}")
    return path


def change(path: Path) -> None:
    """Write another byte, and put the time of the last writing back."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # the clock of file systems goes on in steps of some milliseconds
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forge(root: Path) -> None:
    """Note that the weights are what the manifest says, as whoever hands over the files themselves could."""
    path, stat = weights(root), weights(root).stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    sha256 = json.loads((path.parent / "manifest.json").read_text())["files"][WEIGHTS]["sha256"]
    notes = {"files": {WEIGHTS: {"state": state, "sha256": sha256}}}
    (root / "verified" / f"{KEY}.json").write_text(canonical_json(notes))


def test_files_that_nothing_has_touched_are_read_once(root: Path, hashed: list[str]) -> None:
    assert StageStore(root).find(KEY) is not None and hashed == []
    assert StageStore(root, reads_all=True).find(KEY) is not None and WEIGHTS in hashed


def test_small_files_and_those_that_just_changed_are_read_each_time(
    root: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(root / "verified")
    for name, bound in (("LEAST_BYTES", 1 << 20), ("SETTLED_SECONDS", 60.0)):
        with monkeypatch.context() as patch:
            patch.setattr(remembered, name, bound)
            for _ in range(2):
                hashed.clear()
                assert StageStore(root).find(KEY) is not None and WEIGHTS in hashed
    assert not (root / "verified").exists()


def test_what_was_written_to_is_read_whatever_its_time_says(root: Path) -> None:
    change(weights(root))
    with pytest.raises(CorruptError, match=f"{WEIGHTS}: SHA-256 is"):
        StageStore(root).find(KEY)


def test_notes_that_come_with_a_copy_say_nothing(root: Path, tmp_path: Path, hashed: list[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)  # with all times that can be set
    assert StageStore(copy).find(KEY) is not None and WEIGHTS in hashed


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"../x": {"state": [], "sha256": 1}}}', "[" * 100])
def test_notes_that_are_none_are_written_anew(root: Path, hashed: list[str], text: str) -> None:
    (root / "verified" / f"{KEY}.json").write_text(text)
    assert StageStore(root).find(KEY) is not None and WEIGHTS in hashed
    hashed.clear()
    assert StageStore(root).find(KEY) is not None and hashed == []


def test_a_file_in_place_of_the_notes_is_passed_over(root: Path, hashed: list[str]) -> None:
    shutil.rmtree(root / "verified")
    (root / "verified").touch()
    assert StageStore(root).find(KEY) is not None and WEIGHTS in hashed


def test_a_store_that_cannot_be_written_to_is_read_again(
    root: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    shutil.rmtree(root / "verified")
    monkeypatch.setattr(remembered, "write_atomic", refuse)
    assert StageStore(root).find(KEY) is not None and WEIGHTS in hashed


def test_where_the_manifest_is_held_to_something_outside_no_note_is_asked(root: Path, tmp_path: Path) -> None:
    pointer = point_to(StageStore(root), KEY, root)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / POINTER).write_text(canonical_json(vars(pointer)))
    change(weights(root))
    forge(root)
    # Whoever can forge this could have mended the manifest.
    assert StageStore(root).find(KEY) is not None
    trusting = SigningKeys(None, {"0" * 64: tmp_path / "key.pub"})
    for opened in (
        lambda: StageStore(root, reads_all=True).find(KEY),
        lambda: StageStore(root, trusting).find(KEY),
        lambda: open_pointer(tmp_path / "model"),
    ):
        with pytest.raises(CorruptError, match=f"{WEIGHTS}: SHA-256 is"):
            opened()
