"""What a store's JSON says is checked where it is read: names, keys, types, bounds, nesting, circles and manifests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Document
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.attention import position_tables
from lifelong_moe.storage.keys import file_sha256
from lifelong_moe.storage.stored import MOST_DEEP, parse_json, read_json
from lifelong_moe.storage.verified import verify_directory
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import build_model
from tests.records import METRICS, made_record
from tests.security.hostile import ARGUMENTS, outcome, snapshot

EARLIER = Path(__file__).parents[1] / "integration/earlier"
FIRST, SECOND = "mlruns/stages/fruit-a4d92ce99747f6a2", "mlruns/stages/code-4ed82e7e9bdf14b8"
HEAD = "mlruns/runs/old/head.json"
READERS = ("status", "lineage", "report", "evaluate", "generate", "rollback", "drop", "gc")
"""Commands that read the head, and of them all kinds: those that change it, list stages or load models."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two stages."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(path: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, and mend its directory's manifest, as somebody would who knows both."""
    data = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(change(data) or data))
    mend(Path(path).parent)


def mend(directory: Path) -> None:
    """Make a manifest that lists what is there."""
    if not (manifest := directory / "manifest.json").exists():
        return
    files = [path for path in directory.iterdir() if path != manifest]
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    manifest.write_text(json.dumps({"files": entries}))


def put(path: str) -> Callable[[Any], None]:
    """Set the field at a dotted path, ``a.0.b=value``."""
    where, _, value = path.partition("=")
    *steps, last = (int(step) if step.isdigit() else step for step in where.split("."))

    def change(data: Any) -> None:
        for step in steps:
            data = data[step]
        data[last] = json.loads(value)

    return change


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('run="x/../../evil"', "run: must be a name"),
        ('names.0="../../evil"', "names[0]: must be a name"),
        ('plan.1="/etc/passwd"', "plan[1]: must be 64 hexadecimal digits"),
        ("plan=5", "plan: must be a list"),
        ("seed=1e999", "not JSON"),
        ("seed=123456789012345678901234567890", "seed: must be a number of at most 64 bits"),
        ('data={"../x": "0"}', "data.../x: must be a name"),
        ('mlflow.run={"a": 1}', "mlflow.run: must be a text"),
        ('method="\\u001b[31m"', "method: must be a name"),
        ('tokenizer="\\ud800"', "not JSON"),
    ],
)
def test_a_head_says_what_a_head_says(store: Path, command: str, change: str, message: str) -> None:
    rewrite(HEAD, put(change))
    before = snapshot(store)
    code, error = outcome(command)
    assert code == 7 and error.startswith(f"CorruptError: {HEAD}: {message}") and "\n" not in error
    assert snapshot(store) == before or command == "gc"  # which locks before it looks


@pytest.mark.parametrize("command", ["status", "generate", "gc"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('name="x/../../evil"', "name: must be a name"),
        ('key="../../../evil"', "key: must be 64 hexadecimal digits"),
        ('parent="4ed8"', "parent: must be 64 hexadecimal digits"),
        ('borrowed={"w": "../x"}', "borrowed.w: must be 64 hexadecimal digits"),
        ('removed="all"', "removed: must be a list"),
        ('removed=["../x", 5]', "removed[1]: must be a text"),
    ],
)
def test_a_stage_says_what_a_stage_says(store: Path, command: str, change: str, message: str) -> None:
    if command == "gc" and change.startswith(("name", "removed")):
        return  # gc goes by keys; the directory has its name from the file system
    rewrite(f"{SECOND}/config.json", put(change))
    code, error = outcome(command)
    assert code == 7 and error.startswith(f"CorruptError: {SECOND}/config.json: {message}") and "\n" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("architecture.generations.0.experts=1000000000", "architecture.generations: more than"),
        ('architecture.generations.0.stage="a/b"', "architecture.generations[0].stage: must be a name"),
        ("architecture.generations=[]", "architecture.generations: a model has at least one"),
        ("architecture.frozen=9", "architecture.frozen: must lie in 0 to 2"),
        ("architecture.bos_id=-1", "architecture.bos_id: must lie in 0 to"),
        ("architecture.model.width=true", "architecture.model.width: must be a whole number"),
        ("architecture.model.heads=3", "architecture.model: model.width=8 must be an even multiple"),
        ('architecture.routing.mode="none"', "architecture.routing: routing.mode=none is unknown"),
        ("architecture.routing.top_k=0.5", "architecture.routing.top_k: must be a whole number"),
        ('spec.optim.lr="fast"', "spec.optim.lr: must be a finite number"),
        ("spec.tokens=null", "spec.tokens: must be a whole number"),
        ("tokenizer.hash=5", "tokenizer.hash: must be a text"),
        ("schema=6", "schema: 6 is of a later version"),
        ("schema=5", "key: "),
        ("schema=3", "schema: 3, which no version has written"),
        ("split={}", "schema: missing"),
        ("spec.processes=1", "schema: missing"),
        ('derived={"from": "x"}', "parent: is not what the stage was derived from"),
        ("more=1", "more: no such field"),
    ],
)
def test_a_record_is_refused_by_its_field(store: Path, change: str, message: str) -> None:
    rewrite(f"{SECOND}/config.json", put(change))
    code, error = outcome("lineage")
    assert code == 7 and error.startswith(f"CorruptError: {SECOND}/config.json: {message}") and "\n" not in error


@pytest.mark.parametrize(
    ("before", "after", "file"),
    [
        ("mlruns/runs/old", "mlruns/runs/other", "head.json: run: 'old', but it is stored as other"),
        (SECOND, "mlruns/stages/evil-4ed82e7e9bdf14b8", "config.json: name: 'code-4ed82e7e9bdf14b8', but it is stored"),
    ],
)
def test_what_has_a_name_in_two_places_has_the_same(store: Path, before: str, after: str, file: str) -> None:
    Path(before).rename(after)
    run = Path(after).name if after.startswith("mlruns/runs") else "old"
    for command in ("status", "generate", "lineage"):
        code, error = outcome(command, arguments=[run, *ARGUMENTS[command][1:]])
        assert code == 7 and error.startswith(f"CorruptError: {after}/{file}") and "\n" not in error, (command, error)


def test_a_stage_under_the_key_of_another_is_not_collected(store: Path) -> None:
    Path(SECOND).rename("mlruns/stages/code-0000000000000000")
    code, error = outcome("gc")
    assert code == 7 and "config.json: key: '4ed82e7e9bdf14b8', but it is stored as 0000000000000000" in error


def test_a_report_is_of_its_run(store: Path) -> None:
    rewrite("mlruns/runs/old/report.json", put('run="other"'))
    code, error = outcome("report")
    assert (code, error) == (
        7, "CorruptError: mlruns/runs/old/report.json: run: 'other', but it is stored as old."
    )  # fmt: skip


def test_a_batch_is_its_documents_and_has_their_hash(tmp_path: Path) -> None:
    documents = [Document(text, "s") for text in ("a", "b")]
    batches = BatchStore(tmp_path)
    batch = batches.add(documents, [])
    manifest = tmp_path / "batches" / batch[:16] / "manifest.json"
    written = manifest.read_text()
    for change, message in (
        (lambda data: data["documents"].pop(), "hash: "),
        (lambda data: data.update(hash="0" * 64), "hash: "),
    ):
        data = json.loads(written)
        change(data)
        manifest.write_text(json.dumps(data))
        with pytest.raises(CorruptError, match=message):
            batches.manifest(batch)
    manifest.write_text(written)
    manifest.parent.rename(tmp_path / "batches" / "0000000000000000")
    with pytest.raises(CorruptError, match="but it is stored as 0000000000000000"):
        batches.holding(documents[0].hash)


def test_a_stage_that_is_its_own_ancestor_ends_every_command(store: Path) -> None:
    rewrite(f"{FIRST}/config.json", put('parent="4ed82e7e9bdf14b8c01a4ec7addcb9477a877d6dbd793942e16338a9b197eca5"'))
    for command, message in (("generate", "is its own ancestor"), ("inspect", "is its own ancestor")):
        code, error = outcome(command)
        assert code == 7 and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {}}, "files: lists no file"),
        ({}, "files: missing"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "files./etc/passwd: must be a name"),
        ({"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}, "files.../../x: must be a name"),
        ({"files": {"a": {"bytes": 1, "sha256": "x"}}}, "files.a.sha256: must be 64 hexadecimal digits"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 64}}, "more": 1}, "more: no such field"),
    ],
)
def test_a_manifest_lists_what_is_there_and_nothing_else(store: Path, manifest: Any, message: str) -> None:
    (Path(SECOND) / "manifest.json").write_text(json.dumps(manifest))
    code, error = outcome("status")
    assert (code, error.split("\n")) == (7, [error]) and f"{SECOND}/manifest.json: {message}" in error


def test_a_file_that_no_manifest_lists_is_damage(store: Path) -> None:
    (Path(FIRST) / "more.py").write_text("")
    code, error = outcome("status")
    assert code == 7 and error == f"CorruptError: {FIRST}/more.py: not in the directory's manifest."
    (Path(FIRST) / "more.py").unlink()
    manifest = json.loads((Path(FIRST) / "manifest.json").read_text())
    del manifest["files"]["metrics.json"]
    (Path(FIRST) / "metrics.json").unlink()
    (Path(FIRST) / "manifest.json").write_text(json.dumps(manifest))
    code, error = outcome("status")
    assert code == 7 and error == f"CorruptError: {FIRST}/manifest.json: lists no metrics.json."


@pytest.mark.parametrize("path", [HEAD, f"{SECOND}/manifest.json", "mlruns/runs/old/report.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 200 + "1" + "}" * 200])
def test_what_is_nested_too_deeply_is_one_line(store: Path, path: str, text: str) -> None:
    Path(path).write_text(text)
    for command in ("report", "gc", "status"):
        code, error = outcome(command)
        assert "\n" not in error
        assert code == (7 if f"{path}:" in error else 0) and (code == 7) == ("not JSON" in error)
    with pytest.raises(CorruptError, match="not JSON"):
        read_json(Path(path))


def test_our_own_depth_is_far_below_the_bound() -> None:
    deepest = [0]
    for _ in range(MOST_DEEP - 1):
        deepest = [deepest]  # type: ignore[list-item]
    text = json.dumps(deepest)
    assert parse_json(text.encode(), Path("x")) == deepest
    with pytest.raises(CorruptError, match="nested too deeply"):
        parse_json(f"[{text}]".encode(), Path("x"))


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = Path(FIRST) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    mend(Path(FIRST))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"norm.weight": w["norm.weight"].long()}), "tensor norm.weight is int64 of shape (8,)"),
        (lambda w: w.update({"norm.weight": torch.ones(9)}), "tensor norm.weight is float32 of shape (9,)"),
        (lambda w: w.update({"norm.weight": w["norm.weight"] * torch.inf}), "holds a number that is not finite"),
        (lambda w: w.pop("norm.weight"), "tensor norm.weight is missing"),
        (lambda w: w.update({"evil": torch.ones(1)}), "tensor evil is none of the architecture"),
    ],
)
def test_tensors_are_those_of_the_architecture(store: Path, change: Any, message: str) -> None:
    change_weights(change)
    code, error = outcome("generate", "--stage", "fruit")
    where = FIRST if "finite" not in message else f"{FIRST}/model.safetensors"  # the file that holds it
    assert code == 7 and message in error and error.startswith(f"CorruptError: {where}: ") and "\n" not in error


def test_a_model_takes_no_memory_until_its_tensors_fit(store: Path) -> None:
    """Neither does its router, which may say that it has as many centroids as it likes."""
    stages = StageStore(Path("mlruns"))
    stage = stages.get(json.loads(Path(HEAD).read_text())["stages"][0])
    huge = ClusterConfig(clusters=10**6, feature_width=10**6)
    with pytest.raises(CorruptError, match=r"tensor .* is "):
        build_model(replace(stage.architecture, routing=huge), stages.tensors(stage))


def test_a_long_context_takes_no_memory_until_it_is_used(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(config: ModelConfig, num_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(num_positions)
        return position_tables(config, num_positions, device)

    monkeypatch.setattr("lifelong_moe.model.transformer.position_tables", counted)
    for stage in (FIRST, SECOND):
        rewrite(f"{stage}/config.json", put(f"architecture.model.context={1 << 24}"))
    for command in ("generate", "evaluate"):
        code, error = outcome(command, *(["--max-new-tokens", "3"] if command == "generate" else []))
        assert (code, error) == (0, "")
    assert asked and max(asked) < 1000


@pytest.mark.parametrize("command", ["status", "lineage", "drop", "generate", "evaluate", "inspect", "rollback"])
@pytest.mark.parametrize("name", ["../../x", "x/y", ".x", "", "x" * 129, "\x1b[31m"])
def test_names_on_the_command_line_are_names(store: Path, command: str, name: str) -> None:
    before, arguments = snapshot(store), ARGUMENTS[command]
    asked = [name if one == "old" else one for one in arguments]
    code, error = outcome(command, arguments=asked)
    assert code == 2 and error.startswith("ConfigError: RUN=") and "\n" not in error
    if command in ("generate", "evaluate", "inspect"):
        code, error = outcome(command, f"--stage={name}")
        assert code == 2 and error.startswith("ConfigError: --stage=")
    assert snapshot(store) == before


def test_what_was_verified_is_what_is_read(tmp_path: Path) -> None:
    """The files of a verified directory are exchanged and written to before they are read."""
    store = StageStore(tmp_path)
    stage = store.commit(made_record("ab" * 32), METRICS, {"w": torch.arange(3.0)})
    path, files = stage.path / "model.safetensors", verify_directory(stage.path)
    save_file({"w": torch.ones(3)}, tmp_path / "other")
    path.rename(tmp_path / "before")
    (tmp_path / "other").rename(path)
    with pytest.raises(CorruptError, match="SHA-256 is"):
        store.tensors(stage)
    path.unlink()
    path.symlink_to(tmp_path / "before")
    with pytest.raises(CorruptError, match="a symbolic link"):
        store.tensors(stage)
    path.unlink()
    (tmp_path / "before").rename(path)
    assert store.tensors(stage)["w"].tolist() == [0.0, 1.0, 2.0]
    with files.opened("model.safetensors") as opened:  # whatever stands behind the name by then
        path.rename(tmp_path / "before")
        path.write_bytes(b"other")
        assert load_file(opened)["w"].tolist() == [0.0, 1.0, 2.0]
        (tmp_path / "before").rename(path)
    with pytest.raises(CorruptError, match="2 bytes, but the manifest says"), files.opened("config.json"):
        (stage.path / "config.json").write_text("{}")
