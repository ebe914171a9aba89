"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage import tensors
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.keys import file_sha256
from lifelong_moe.storage.tensors import DTYPES, forms_of, read_into, write_hashed
from lifelong_moe.storage.verified import verify_directory

HELD = {
    kind: torch.arange(6).view(2, 3).to(getattr(torch, name)) for kind, name in DTYPES.items()
} | {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5), "large": torch.arange(100.0)}  # fmt: skip


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kinds of numbers, and however many go at once."""
    for number, at_once in enumerate((1 << 20, 7)):
        monkeypatch.setattr(tensors, "WRITTEN_BYTES", at_once)
        entry = write_hashed(HELD, path := tmp_path / str(number))
        assert (entry.bytes, entry.sha256) == (path.stat().st_size, file_sha256(path))
        found = load_file(path)
        assert found.keys() == HELD.keys()
        assert all(one.dtype == HELD[n].dtype and torch.equal(one, HELD[n]) for n, one in found.items())


def test_the_hash_of_what_was_written_is_the_manifest_s(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", {"x.safetensors": lambda path: write_hashed(HELD, path)})
    files = verify_directory(tmp_path / "a")  # reads and hashes
    forms = forms_of(files, "x.safetensors")
    assert {n: (form.shape, form.dtype) for n, form in forms.items()} == {
        n: (t.shape, t.dtype) for n, t in HELD.items()
    }
    targets = {name: torch.empty_like(form, device="cpu") for name, form in forms.items()}
    read_into(files, "x.safetensors", targets)
    assert all(torch.equal(one, HELD[name]) for name, one in targets.items())


def test_numbers_are_converted_whatever_torch_s_default_device(tmp_path: Path) -> None:
    stored, target = torch.arange(6.0).bfloat16(), torch.zeros(6)
    write_directory(tmp_path / "a", {"x.safetensors": lambda path: write_hashed({"w": stored}, path)})
    with torch.device("meta"):
        read_into(verify_directory(tmp_path / "a"), "x.safetensors", {"w": target})
    assert torch.equal(target, stored.float())


def test_a_place_may_be_laid_out_in_another_order(tmp_path: Path) -> None:
    """As a transposed matrix of a router of the user's own."""
    stored = torch.arange(6.0).view(2, 3)
    write_directory(tmp_path / "a", {"x.safetensors": lambda path: write_hashed({"w": stored}, path)})
    target = torch.zeros(3, 2).T
    read_into(verify_directory(tmp_path / "a"), "x.safetensors", {"w": target})
    assert torch.equal(target, stored)


def test_a_kind_of_numbers_that_no_model_has(tmp_path: Path) -> None:
    odd = {"w": torch.zeros(2, dtype=torch.float8_e5m2fnuz)}
    write_directory(tmp_path / "a", {"x.safetensors": lambda path: save_file(odd, path)})
    with pytest.raises(CorruptError, match="tensor w holds numbers of the kind F8_E5M2FNUZ"):
        forms_of(verify_directory(tmp_path / "a"), "x.safetensors")
