"""Signed stages: changed bytes are refused though their hashes were mended, and keys stay where they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.keys import canonical_json, file_sha256
from lifelong_moe.storage.signing import PRIVATE, PUBLIC, SigningKeys, signed_by
from lifelong_moe.storage.verified import MANIFEST
from lifelong_moe.store.garbage import collect
from lifelong_moe.store.stages import WEIGHTS, StageStore
from tests.e2e.conftest import Cli
from tests.known_stages import use_known_stages
from tests.records import METRICS, made_record
from tests.retrain_lab import arrive, make_base, stages, tick

pytest.importorskip("model_signing", reason="the extra signing is not installed")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

pytestmark = pytest.mark.xdist_group("signing")  # one process trains what all of them change
SECRET = "correct horse"


class Pair:
    """A key pair in two files, as OpenSSL writes them."""

    def __init__(self, folder: Path, name: str, key: Any = None, *, encrypted: bool = False) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        kept = BestAvailableEncryption(SECRET.encode()) if encrypted else NoEncryption()
        self.private, self.public = folder / f"{name}.key", folder / f"{name}.pub"
        self.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, kept))
        self.private.chmod(0o600)
        self.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.public.read_bytes()).hexdigest()

    def keys(self) -> SigningKeys:
        return SigningKeys(self.private, {self.fingerprint: self.public})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Pair:
    return Pair(tmp_path, "theirs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "weights").write_bytes(bytes(1000))
    (path / ".gitignore").write_text("ignored by a library, not by us")
    return path


@pytest.fixture
def signature(folder: Path, pair: Pair, tmp_path: Path) -> Path:
    path = tmp_path / "signatures" / "folder.sig"
    pair.keys().sign(folder, path)
    return path


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda folder: change_byte(folder / "weights"),
    "a file of git": lambda folder: change_byte(folder / ".gitignore"),
    "one more file": lambda folder: (folder / "more").write_text("x"),
    "one more hidden file": lambda folder: (folder / ".git").write_text("x"),
    "a file less": lambda folder: (folder / "weights").unlink(),
    "another name": lambda folder: (folder / "weights").rename(folder / "weight"),
    "a link": lambda folder: (folder / "link").symlink_to(folder / "weights"),
}


def test_what_was_signed_is_verified(folder: Path, signature: Path, pair: Pair) -> None:
    pair.keys().verify(folder, signature)
    assert signed_by(signature) == pair.fingerprint


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_refused(folder: Path, signature: Path, pair: Pair, change: str) -> None:
    CHANGES[change](folder)
    with pytest.raises(CorruptError, match=f"not what {pair.fingerprint[:16]} signed"):
        pair.keys().verify(folder, signature)


def test_files_that_are_read_must_be_those_that_were_signed(folder: Path, signature: Path, pair: Pair) -> None:
    digest = file_sha256(folder / "weights")
    pair.keys().verify(folder, signature, {"weights": digest})
    for read in ({"weights": "0" * 64}, {"weights": digest, "more": digest}):
        with pytest.raises(CorruptError, match="replaced meanwhile"):
            pair.keys().verify(folder, signature, read)


def test_another_key_is_refused_also_if_it_claims_to_be_ours(
    folder: Path, signature: Path, pair: Pair, stranger: Pair
) -> None:
    stranger.keys().sign(folder, signature)
    with pytest.raises(CorruptError, match=f"signed by the key {stranger.fingerprint[:16]}, which {PUBLIC} does not"):
        pair.keys().verify(folder, signature)
    claim = signature.read_text().replace(stranger.fingerprint, pair.fingerprint)
    signature.write_text(claim)
    with pytest.raises(CorruptError, match="wrong signature"):
        pair.keys().verify(folder, signature)


def test_a_signature_of_another_folder_is_refused(folder: Path, signature: Path, pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights").write_bytes(bytes(999))
    with pytest.raises(CorruptError, match="not what"):
        pair.keys().verify(other, signature)


def nested(pair: Pair) -> str:
    """Claims to be ours, and is too deep for a parser."""
    bundle = {"verificationMaterial": {"publicKey": {"hint": pair.fingerprint}}, "dsseEnvelope": "DEEP"}
    return json.dumps(bundle).replace('"DEEP"', "[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", '{"verificationMaterial": []}', "\x00", "[" * 100_000, "HINT", "NESTED"],
)
def test_no_signature_at_all_is_refused_in_one_line(folder: Path, signature: Path, pair: Pair, content: str) -> None:
    hint = json.dumps({"verificationMaterial": {"publicKey": {"hint": pair.fingerprint}}})
    signature.write_text({"HINT": hint, "NESTED": nested(pair)}.get(content, content))
    with pytest.raises(CorruptError) as error:
        pair.keys().verify(folder, signature)
    assert "\n" not in str(error.value)
    signature.unlink()
    with pytest.raises(CorruptError, match=f"not signed, but {PUBLIC} is set"):
        pair.keys().verify(folder, signature)


def test_characters_that_some_decoders_pass_over_are_refused(folder: Path, signature: Path, pair: Pair) -> None:
    bundle = json.loads(signature.read_text())
    bundle["dsseEnvelope"]["payload"] = "[]" + bundle["dsseEnvelope"]["payload"]
    signature.write_text(json.dumps(bundle))
    with pytest.raises(CorruptError, match="not what"):
        pair.keys().verify(folder, signature)


def test_a_link_or_a_pipe_for_a_signature_is_refused_without_waiting(
    folder: Path, signature: Path, pair: Pair, tmp_path: Path
) -> None:
    real = signature.rename(tmp_path / "real.sig")
    signature.symlink_to(real)
    with pytest.raises(CorruptError, match="a symbolic link"):
        pair.keys().verify(folder, signature)
    signature.unlink()
    os.mkfifo(signature)
    with pytest.raises(CorruptError, match="a FIFO"):
        pair.keys().verify(folder, signature)


@pytest.mark.parametrize("name", [PRIVATE, PUBLIC])
@pytest.mark.parametrize("kind", ["empty", "missing", "directory", "rsa", "ed25519", "curve", "text", "other half"])
def test_an_unusable_key_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    made = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "curve": lambda: ec.generate_private_key(ec.SECP256K1()),
    }
    found = Pair(tmp_path, "key", made.get(kind, lambda: None)())
    ours = (name == PRIVATE) == (kind != "other half")
    path = {"missing": tmp_path / "none", "directory": tmp_path}.get(kind, found.private if ours else found.public)
    path = path if kind != "text" else tmp_path / "text"
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    found.public.chmod(0o600)
    monkeypatch.setenv(name, "" if kind == "empty" else str(path))
    with pytest.raises(ConfigError, match=name):
        SigningKeys.from_environment()


def test_a_private_key_is_its_owners_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = Path(shutil.copy(pair.private, tmp_path / "open.key"))
    copy.chmod(0o644)
    monkeypatch.setenv(PRIVATE, str(copy))
    with pytest.raises(ConfigError, match="everybody on this machine can use it"):
        SigningKeys.from_environment()
    monkeypatch.setenv(PRIVATE, str(Pair(tmp_path, "locked", encrypted=True).private))
    with pytest.raises(ConfigError, match="encrypted") as error:
        SigningKeys.from_environment()
    assert SECRET not in str(error.value)


def test_several_keys_are_trusted_but_never_fewer_than_sign(
    pair: Pair, stranger: Pair, monkeypatch: pytest.MonkeyPatch, folder: Path, signature: Path
) -> None:
    monkeypatch.setenv(PUBLIC, f"{stranger.public}{os.pathsep}{pair.public}")
    SigningKeys.from_environment().verify(folder, signature)
    monkeypatch.setenv(PRIVATE, str(pair.private))
    assert SigningKeys.from_environment().private == pair.private
    monkeypatch.setenv(PUBLIC, str(stranger.public))
    with pytest.raises(ConfigError, match=f"{PRIVATE}=.* is of the key {pair.fingerprint[:16]}, which {PUBLIC}"):
        SigningKeys.from_environment()


def test_without_the_extra_a_key_is_refused_and_nothing_else(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifelong_moe.storage.signing.find_spec", lambda name: None)
    assert SigningKeys.from_environment() == SigningKeys()
    monkeypatch.setenv(PUBLIC, str(pair.public))
    with pytest.raises(ConfigError, match=r"pip install 'lifelong-moe\[signing\]'"):
        SigningKeys.from_environment()


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    """A run that was finished before there was a key, and a promotion after."""
    root = tmp_path_factory.mktemp("signed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        make_base(root)
        assert not Path("mlruns/signatures").exists()
        patch.setenv(PRIVATE, str(pair.private))
        arrive("sea")
        assert tick()["outcome"] == "promoted"
    return root


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Pair) -> Iterator[Path]:
    """A copy of it, with the public key configured."""
    root = tmp_path / "signed"
    shutil.copytree(signed_once, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv(PUBLIC, str(pair.public))
    yield root


def folders() -> list[Path]:
    return sorted(Path("mlruns/stages").iterdir())


def mend(stage: Path) -> None:
    """Write a manifest that says what the files are now."""
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in stage.iterdir()
        if path.name != MANIFEST
    }
    (stage / MANIFEST).write_text(canonical_json({"files": entries}))


READERS = {
    "generate": ("generate", "tiny", "apple", "--max-new-tokens", "2"),
    "evaluate": ("evaluate", "tiny", "--data", "fruit.jsonl", "--json"),
    "inspect": ("inspect", "tiny", "--text", "apple"),
    "inspect, held-out": ("inspect", "tiny", "--tokens", "100"),
    "retrain": ("retrain", "retrain.yaml"),
    "status": ("status", "tiny"),
    "lineage": ("lineage", "tiny"),
    "rollback": ("rollback", "tiny", "--to", "0"),
    "drop": ("drop", "tiny", "code", "--no-gate"),
}


@pytest.mark.parametrize("command", READERS)
def test_every_reader_accepts_what_was_signed_and_refuses_changed_bytes_with_mended_hashes(
    signed: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    arguments = READERS[command]
    if command in ("generate", "lineage"):
        assert cli(*arguments).code == 0
    if command == "retrain":
        arrive("sea", "newer.jsonl", seed=78)  # a tick that finds nothing new loads nothing
    # The first stage: all others borrow from it.
    stage = next(path for path in folders() if path.name.startswith("fruit-"))
    change_byte(stage / WEIGHTS)
    mend(stage)
    before = {path: path.stat().st_mtime_ns for path in Path("mlruns").rglob("*") if path.suffix == ".safetensors"}
    found = cli(*arguments)
    assert (found.code, len(found.err.splitlines())) == (7, 1), found
    assert "Traceback" not in found.err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    if command == "generate":
        # Hashes alone do not tell: that is what the signature is for.
        monkeypatch.delenv(PUBLIC)
        assert cli(*arguments).code == 0


def test_a_planted_stage_is_not_taken_for_a_candidate(signed: Path) -> None:
    key, unsigned = "ab" * 32, StageStore(Path("mlruns"), keys=SigningKeys())
    unsigned.commit(made_record(key), METRICS, {"w": torch.zeros(1)})
    with pytest.raises(CorruptError, match="not signed"):
        StageStore(Path("mlruns")).find(key)
    # Nor is it if it gets the signature of another stage.
    shutil.copy(next(Path("mlruns/signatures").iterdir()), Path(f"mlruns/signatures/{key}.sig"))
    with pytest.raises(CorruptError, match="not what"):
        StageStore(Path("mlruns")).find(key)


def test_all_that_a_champion_needs_is_signed_and_lineage_says_by_whom(
    signed: Path, pair: Pair, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(cli("lineage", "tiny", "--json").out)["stages"]
    assert [row["signed_by"] for row in rows] == [pair.fingerprint] * 3
    assert all(row["signature_verified"] for row in rows)
    assert "verified" in cli("lineage", "tiny").out
    monkeypatch.delenv(PUBLIC)
    rows = json.loads(cli("lineage", "tiny", "--json").out)["stages"]
    assert [(row["signed_by"], row["signature_verified"]) for row in rows] == [(pair.fingerprint, False)] * 3
    assert "not verified" in cli("lineage", "tiny").out


def test_signatures_stand_beside_stages_and_change_nothing_in_them(signed: Path) -> None:
    for path in folders():
        assert {file.name for file in path.iterdir()} == {MANIFEST, *json.loads((path / MANIFEST).read_text())["files"]}
    signatures = {path.stem[:16] for path in Path("mlruns/signatures").iterdir()}
    assert signatures <= {name[-16:] for name in stages()}


def test_a_signature_goes_with_its_stage(signed: Path) -> None:
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    (kept, *gone) = [path.stem for path in sorted(Path("mlruns/signatures").iterdir())]
    assert set(gone) - {kept}
    shutil.rmtree("mlruns/runs")
    old = time.time() - 30 * 24 * 3600
    newest = max(path.stat().st_mtime for path in Path("mlruns").rglob("*"))
    for path in [*Path("mlruns").rglob("*")]:
        os.utime(path, (old, old))
    # The newest stage is always kept, and with it its chain.
    newest_stage = next(path for path in folders() if path.name.endswith(head["plan"][0][:16]))
    os.utime(newest_stage / MANIFEST, (newest, newest))
    garbage = collect(Path("mlruns"), Path("data/cache"), time.time())
    assert {path.stem for path in Path("mlruns/signatures").iterdir()} == {head["plan"][0]}
    assert {stored.key for stored in garbage.signatures} == {*gone, kept} - {head["plan"][0]}


def test_the_private_key_is_stored_and_shown_nowhere(signed_once: Path, pair: Pair) -> None:
    secret = b"".join(pair.private.read_bytes().splitlines()[1:-1])[-40:]
    for path in signed_once.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret not in data.replace(b"\n", b""), path
            assert str(pair.private).encode() not in data, path


def test_an_unusable_key_stops_every_command_before_it_writes(lab: Path, cli: Cli, monkeypatch: Any) -> None:
    monkeypatch.setenv(PRIVATE, str(lab / "none.key"))
    for arguments in (("run", "tiny.yaml"), ("gc",), ("status", "tiny")):
        found = cli(*arguments)
        assert (found.code, len(found.err.splitlines())) == (2, 1), found
    assert not Path("mlruns").exists()
