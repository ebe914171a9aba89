"""Versions of a run: rollback, drop, garbage, and back from experts and documents to what made them."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lifelong_moe.errors import ConfigError, CorruptError, LockedError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.garbage import collect, find_garbage
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import base_stages
from lifelong_moe.training.restore import load_model
from pipelines.inspect import trace
from pipelines.inspect.status import show_status
from pipelines.upkeep.gc import gc
from pipelines.versions.drop import drop
from pipelines.versions.rollback import rollback
from tests.known_stages import use_known_stages
from tests.retrain_lab import change_head, head, three_stages
from tests.tiny import tiny_config, train, write_config, write_corpora

SILENT = Console(quiet=True)
MLRUNS, CACHE = Path("mlruns"), Path("data/cache")
DAY = 86400.0


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages with bundles, and one of its first two."""
    root = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        write_corpora(root)
        write_config(three_stages())
        train()
        train("tiny.yaml", "run=short", "stages=[{data: fruit}, {data: code}]")
    return root


@pytest.fixture(autouse=True)
def lab(base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    root = tmp_path / "lab"
    shutil.copytree(base, root)
    monkeypatch.chdir(root)
    return root


def served() -> list[str]:
    """Names of the champion's stages."""
    return [stage.name for stage in require_head(MLRUNS, "tiny").champion.stages]


def bits() -> dict[str, bytes]:
    """Every file of every stage."""
    return {str(path): path.read_bytes() for path in sorted(Path("mlruns/stages").rglob("*")) if path.is_file()}


def two_versions() -> None:
    """The first two stages as version 0, all three as version 1."""
    record, store = RunRecord(MLRUNS, "tiny"), StageStore(MLRUNS)
    now = require_head(MLRUNS, "tiny")
    chain = base_stages(store.chain(now.plan[-1]))
    early = replace(now, plan=now.plan[:2], names=now.names[:2], stages=now.stages[:2])
    begun = early.with_base(chain[:2], "2026-01-01T00:00:00Z")
    record.set_head(begun.promoted("promoted", chain, "better", "2026-01-02T00:00:00Z"))


def test_rollback_swaps_a_pointer_and_touches_no_stage() -> None:
    two_versions()
    before = bits()
    result = rollback("tiny", None, SILENT)
    assert (result["champion"], result["was"]) == (0, 1) and served() == ["fruit", "code"]
    assert head()["names"] == ["fruit", "code"] and len(head()["versions"]) == 2
    assert show_status("tiny", SILENT)["champion"]["stage"] == "code"
    with pytest.raises(ConfigError, match="none served before it"):
        rollback("tiny", None, SILENT)
    assert rollback("tiny", 1, SILENT)["champion"] == 1 and served() == ["fruit", "code", "sea"]
    with pytest.raises(ConfigError, match="no version 7; there are 0 to 1"):
        rollback("tiny", 7, SILENT)
    assert bits() == before
    events = [json.loads(line)["event"] for line in Path("mlruns/runs/tiny/ledger.jsonl").read_text().splitlines()]
    assert events.count("rollback") == 2


def test_rollback_needs_versions_stages_and_the_lock() -> None:
    with pytest.raises(ConfigError, match="no versions yet"):
        rollback("tiny", None, SILENT)
    two_versions()
    shutil.rmtree(next(Path("mlruns/stages").glob("code-*")))
    with pytest.raises(CorruptError, match="stage code"):
        rollback("tiny", None, SILENT)
    assert head()["champion"] == 1
    with pytest.raises(ConfigError, match="run nobody does not exist"):
        rollback("nobody", None, SILENT)


def test_dropping_the_newest_stage_is_as_if_it_had_never_been() -> None:
    result = drop("tiny", "sea", SILENT)
    short = json.loads(Path("mlruns/runs/short/head.json").read_text())
    assert (result["derived"], result["remains"]) == (False, []) and result["key"] == short["plan"][-1]
    assert served() == ["fruit", "code"] and [v["kind"] for v in head()["versions"]] == ["base", "dropped"]
    rollback("tiny", None, SILENT)
    assert served() == ["fruit", "code", "sea"]


def test_dropping_an_older_stage_derives_a_model_without_its_experts() -> None:
    before = bits()
    result = drop("tiny", "code", SILENT)
    assert result["derived"] and result["remains"] and result["gated"] and result["outcome"] == "promoted"
    store = StageStore(MLRUNS)
    full, without = store.chain(result["key"])[-2:]
    assert all(bits()[path] == content for path, content in before.items())  # published stages never change
    model, old = load_model(store, without), load_model(store, full)
    assert [g.stage for g in model.architecture.generations] == ["fruit", "sea"]
    assert torch.equal(model.embedding.weight, old.embedding.weight)
    ours, theirs = (next(iter(one.moe_layers())).banks.matrices() for one in (model, old))
    assert len(ours) == 6 and torch.equal(ours[4][0], theirs[6][0])
    assert drop("tiny", "sea", SILENT)["derived"]  # no longer the newest of this version
    assert [g.stage for g in load_model(store, store.get(head()["stages"][-1])).architecture.generations] == ["fruit"]


def test_a_drop_that_harms_a_slice_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measurements.losses

    def worse(self: Measurements, key: str, name: str) -> DocumentLosses:
        losses = measured(self, key, name)
        lost = losses.tokens * 0.05 * (StageStore(MLRUNS).get(key).derived is not None)
        return DocumentLosses(losses.nats + lost, losses.tokens, losses.sources)

    monkeypatch.setattr(Measurements, "losses", worse)
    gate, slice_ = "gate.tolerance=0.2", "gate.slices.x.sources='sha256:[0-7]*'"
    before = bits()
    with pytest.raises(ConfigError, match=r"gate.slices.y.sources=cs-.*: no source of held-out text is named so"):
        drop("tiny", "code", SILENT, ["gate.slices.y.sources=cs-*"])
    assert bits() == before
    assert drop("tiny", "code", SILENT, [gate, slice_, "gate.slices.x.tolerance=0.01"])["outcome"] == "rejected"
    assert drop("tiny", "code", SILENT, [gate, slice_])["outcome"] == "promoted"


def test_a_drop_that_harms_other_text_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    before, measured = ["fruit", "code", "sea"], Measurements.losses

    def worse(self: Measurements, key: str, name: str) -> DocumentLosses:
        losses = measured(self, key, name)
        lost = losses.tokens * 0.5 if StageStore(MLRUNS).get(key).derived is not None and name == "sea" else 0
        assert name != "code"  # what is to be forgotten does not count
        return DocumentLosses(losses.nats + lost, losses.tokens, losses.sources)

    monkeypatch.setattr(Measurements, "losses", worse)
    result = drop("tiny", "code", SILENT)
    assert (result["outcome"], served()) == ("rejected", before)
    assert StageStore(MLRUNS).find(result["key"]) is not None  # it can be inspected
    line = json.loads(Path("mlruns/runs/tiny/ledger.jsonl").read_text().splitlines()[-1])
    assert (line["event"], line["outcome"], line["stage"]) == ("drop", "rejected", "code")
    assert drop("tiny", "code", SILENT, ["gate.tolerance=1"])["outcome"] == "promoted"
    rollback("tiny", None, SILENT)
    assert drop("tiny", "code", SILENT, ungated=True)["outcome"] == "promoted"
    assert served() == [*before, "code.dropped"]


def test_what_the_gate_cannot_read_is_not_dropped_unless_it_must() -> None:
    for name in ("fruit", "code", "sea"):
        Path(f"{name}.jsonl").unlink()
    known = head()["texts"]
    assert drop("tiny", "code", SILENT)["gated"] is True  # by the held-out text that was kept
    rollback("tiny", None, SILENT)
    not_kept = {name: {**known[name], "kept": None} for name in ("fruit", "sea")}
    for texts, reason in (({}, "fruit.jsonl: no such file"), ({**known, **not_kept}, "no text of run tiny is left")):
        change_head(texts=texts)  # as an earlier version, or evaluate.keep_heldout=false, left it
        before = head()
        with pytest.raises(ConfigError, match=rf"the gate of drop cannot read the run's text .*{reason}.*--no-gate"):
            drop("tiny", "code", SILENT)
        assert head() == before
    with pytest.raises(ConfigError, match=r"only gate\.KEY=VALUE"):
        drop("tiny", "code", SILENT, ["seed=1"])
    assert drop("tiny", "code", SILENT, ungated=True)["gated"] is False


@pytest.mark.parametrize(
    ("stage", "message"), [("fruit", "is the first"), ("soup", "has no stage soup"), ("code.dropped", "has no stage")]
)
def test_what_cannot_be_dropped(stage: str, message: str) -> None:
    before = head()
    with pytest.raises(ConfigError, match=message):
        drop("tiny", stage, SILENT)
    assert head() == before


def test_only_garbage_is_collected_and_only_when_it_is_old() -> None:
    train("tiny.yaml", "run=gone", "seed=1", "stages=[{data: fruit}, {data: code}]")
    shutil.rmtree("mlruns/runs/gone")
    kept = {
        path.name
        for path in Path("mlruns/stages").glob("*")
        if json.loads((path / "config.json").read_text())["spec"]["seed"] == 0
    }
    young = gc(False, SILENT)
    assert young["stages"] == []
    assert len(young["young"]) == 3  # two stages, and the first one's centroids; their evaluations live with them
    found = find_garbage(MLRUNS, CACHE, time.time() + 30 * DAY, grace=-1)
    assert {stored.path.name for stored in found.stages} == {p.name for p in Path("mlruns/stages").glob("*")} - kept
    order = [stored.path.name.rsplit("-", 1)[0] for stored in found.stages]
    assert sorted(order) == ["code", "fruit", "fruit.centroids"] and order[-1] == "fruit"  # what others need goes last
    assert found.evaluations and found.bytes > 0
    evaluations = set(MLRUNS.glob("evaluations/*.json"))
    collect(MLRUNS, CACHE, time.time(), grace=-1)
    assert set(MLRUNS.glob("evaluations/*.json")) == evaluations - {stored.path for stored in found.evaluations}
    assert {path.name for path in Path("mlruns/stages").glob("*")} == kept
    report, printed = train()
    assert "Nothing to train" in printed and len(report["stages"]) == 3


def test_tokens_that_nobody_opened_for_a_month_are_collected() -> None:
    caches = sorted(CACHE.glob("tokens/*"))
    assert len(caches) > 1
    for path in caches:
        for entry in path.iterdir():
            os.utime(entry, (time.time() - 31 * DAY,) * 2)
    train()  # opens those of this run, both parts of each distribution
    shown = gc(False, SILENT)
    unused = {entry["path"] for entry in shown["tokens"]}
    opened = {str(path) for path in caches if (path / "manifest.json").stat().st_mtime > time.time() - DAY}
    assert len(opened) == 6 and unused == {str(path) for path in caches} - opened
    assert all(path.is_dir() for path in caches)
    left_over = CACHE / "tokens/.tmp-0123456789abcdef@elsewhere"
    left_over.mkdir()
    os.utime(left_over, (0, 0))
    assert {entry["path"] for entry in gc(True, SILENT)["tokens"]} == unused
    assert {str(path) for path in CACHE.glob("tokens/*")} == opened


def test_every_version_and_every_live_plan_is_kept() -> None:
    two_versions()
    rollback("tiny", None, SILENT)
    shutil.rmtree("mlruns/runs/short")
    assert find_garbage(MLRUNS, CACHE, time.time(), grace=-1).stages == []
    key = head()["versions"][1]["stages"][-1]["key"]
    change_head(versions=head()["versions"][:1], trained=[])
    assert [stored.key for stored in find_garbage(MLRUNS, CACHE, time.time(), grace=-1).stages] == [key]
    plan = Path("mlruns/runs/tiny/plans/one.json")
    plan.parent.mkdir()
    for made, expires, left in (
        (None, "2999-01-01T00:00:00Z", []),
        (None, "2020-01-01T00:00:00Z", [key]),
        ("2999-01-01T00:00:00Z", "2999-01-08T00:00:00Z", [key]),  # of a clock that was ahead
    ):
        plan.write_text(json.dumps({"stages": [key], "made_at": made, "expires": expires}))
        assert [stored.key for stored in find_garbage(MLRUNS, CACHE, time.time(), grace=-1).stages] == left


@pytest.mark.parametrize("jump", [-3650 * DAY, 3650 * DAY])
def test_a_clock_that_jumps_removes_nothing_young(jump: float) -> None:
    shutil.rmtree("mlruns/runs/tiny")
    shutil.rmtree("mlruns/runs/short")
    assert collect(MLRUNS, CACHE, time.time() + jump).stages == []
    for path in Path("mlruns/stages").rglob("*"):
        os.utime(path, (time.time() + jump, time.time() + jump))
    assert collect(MLRUNS, CACHE, time.time()).stages == [] and len(bits()) > 3


def test_nothing_is_removed_beside_a_working_process() -> None:
    shutil.rmtree("mlruns/runs/short")
    pid = os.fork()
    if not pid:  # POSIX locks do not exclude their own process
        with locked(RunRecord(MLRUNS, "tiny").lock_path, "run tiny"):
            Path("locked").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not Path("locked").exists():
            time.sleep(0.01)
        with pytest.raises(LockedError):
            gc(True, SILENT)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_an_unreadable_head_stops_the_collection() -> None:
    Path("mlruns/runs/tiny/head.json").write_text("{")
    before = bits()
    with pytest.raises(CorruptError, match="nothing is removed"):
        collect(MLRUNS, CACHE, time.time(), grace=-1)
    assert bits() == before


def test_what_made_an_expert() -> None:
    found = trace.expert("tiny", "code/L1/E4", SILENT)
    assert found["born"]["stage"] == "code" and list(found["born"]["data"]) == ["code"]
    assert [(row["stage"], row["tensors"]) for row in found["stages"]] == [("code", "trained"), ("sea", "borrowed")]
    assert {row["held_by"] for row in found["stages"]} == {found["born"]["key"]}
    with pytest.raises(ConfigError, match=r"no such expert; it has fruit/L0\.\.1/E0\.\.3"):
        trace.expert("tiny", "code/L1/E0", SILENT)
    with pytest.raises(ConfigError, match="STAGE/L<layer>/E<index>"):
        trace.expert("tiny", "code", SILENT)


def test_what_learned_from_a_document() -> None:
    from lifelong_moe.data.text.documents import Document

    texts = [json.loads(line)["text"] for line in Path("code.jsonl").read_text().splitlines()]
    parts: dict[str, list[list[str]]] = {"train": [], "heldout": []}
    for text in texts:
        if parts["heldout"] and len(parts["train"]) > 3:
            break
        found = trace.document("tiny", Document(text, "").hash[:20], SILENT)
        (holder,) = found["held_by"]
        parts[holder["part"]].append([row["stage"] for row in found["stages"]])
        assert holder["distribution"] == "code"
    assert all(rows == ["code"] for rows in parts["train"]) and parts["train"]
    assert all(rows == [] for rows in parts["heldout"]) and parts["heldout"]
    row = trace.document("tiny", Document(texts[0], "").hash, SILENT)["stages"]
    assert not row or row[0]["experts"] == "code/L0..1/E4..5"
    with pytest.raises(ConfigError, match="at least 8"):
        trace.document("tiny", "abc", SILENT)
    with pytest.raises(ConfigError, match="holds such a document"):
        trace.document("tiny", "0" * 64, SILENT)


def test_replay_counts_as_having_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lifelong_moe.data.text.documents import Document

    root = tmp_path / "replay"
    root.mkdir()
    monkeypatch.chdir(root)
    write_corpora(root)
    config: dict[str, Any] = tiny_config(("fruit", "code"))
    write_config(config)
    train()
    roles = set()
    for line in Path("fruit.jsonl").read_text().splitlines()[:3]:
        found = trace.document("tiny", Document(json.loads(line)["text"], "").hash, SILENT)
        roles |= {(row["stage"], row["role"]) for row in found["stages"]}
    assert roles == {("fruit", "learned"), ("code", "replayed")}
