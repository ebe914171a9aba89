"""What a server gets of a version: all that the stage needs, signatures included, and no word of the store's place."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from lifelong_moe.errors import CorruptError
from lifelong_moe.store.pointer import open_pointer
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.registry import Version, register_version
from tests.records import METRICS, commit_made, made_record

RUN = "0" * 32


class Server:
    """A client whose artifacts are kept below a folder; has no model yet."""

    def __init__(self, root: Path) -> None:
        self.artifacts, self.source, self.aliases = LocalArtifactRepository(str(root)), "", dict[str, str]()

    def search_model_versions(self, asked: str) -> list[Any]:
        return [SimpleNamespace(version="7", source=self.source, description="")] if self.source else []

    def create_registered_model(self, name: str) -> None:
        pass

    def create_model_version(self, name: str, source: str, **given: Any) -> Any:
        self.source = source
        return SimpleNamespace(version="7")

    def update_model_version(self, name: str, number: str, description: str) -> None:
        assert f"models:/{name}/{number}" in description

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.aliases[alias] = number


def two_stages(root: Path) -> CommittedStage:
    """The second borrows from the first."""
    first = commit_made(root, "11" * 32)
    record = made_record("22" * 32, "two", parent=first.key, borrowed={"w": first.key})
    return StageStore(root).commit(record, METRICS, {"v": torch.ones(1)})


def registered(root: Path, server: Server) -> str:
    stage = two_stages(root)
    tags = {"stage_key": stage.key}
    version = Version("lifelong-moe.r", StageStore(root), stage, RUN, tags, "note", "champion")
    return register_version(server, server.artifacts, version, remote=True)  # type: ignore[arg-type]


def test_a_server_gets_all_that_a_stage_needs_once(tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    assert [registered(tmp_path / "mlruns", server) for _ in range(2)] == ["7", "7"]
    assert (server.source, server.aliases) == (f"runs:/{RUN}/models/two-{'2' * 16}", {"champion": "7"})
    shutil.rmtree(tmp_path / "mlruns")
    (folder,) = (tmp_path / "server/models").iterdir()
    store, stage = open_pointer(folder / "data")
    assert {name: tensor.tolist() for name, tensor in store.tensors(stage).items()} == {"w": [0.0], "v": [1.0]}
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(str(tmp_path).encode() in content for content in written)
    # Other stages than those that were registered are refused, whatever their own manifests say.
    shutil.rmtree(folder / f"data/stages/one-{'1' * 16}")
    StageStore(folder / "data").commit(made_record("11" * 32), METRICS, {"w": torch.ones(1)})
    with pytest.raises(CorruptError, match="not the one that"):
        open_pointer(folder / "data")


def test_signatures_go_with_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("model_signing", reason="the extra signing is not installed")
    from lifelong_moe.storage.signing import PRIVATE, PUBLIC
    from tests.security.test_signing import Pair

    pair, server = Pair(tmp_path, "ours"), Server(tmp_path / "server")
    monkeypatch.setenv(PRIVATE, str(pair.private))
    registered(tmp_path / "mlruns", server)
    monkeypatch.delenv(PRIVATE)
    monkeypatch.setenv(PUBLIC, str(pair.public))
    (data,) = (tmp_path / "server/models").glob("*/data")
    assert open_pointer(data)[1].name == "two"
    (data / f"signatures/{'11' * 32}.sig").unlink()
    with pytest.raises(CorruptError, match="not signed"):
        open_pointer(data)
