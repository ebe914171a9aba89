"""Ticks when text is gone: the base's files, and what ``inbox.keep_text`` removes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens import texts
from lifelong_moe.data.tokens.records import HeldoutStore
from lifelong_moe.errors import ConfigError, TryAgainError
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.retraining.decision import Action, Decision
from lifelong_moe.store.garbage import collect, find_garbage
from pipelines.inspect.trace import document
from pipelines.retrain import plan as retrain_plan
from pipelines.upkeep.gc import gc
from pipelines.versions.consolidate import consolidate
from pipelines.versions.rollback import rollback
from tests.retrain_lab import arrive, head, stages, tick, tick_and_text, write_retraining
from tests.tiny import fork, kill_self, write_corpus

SILENT = Console(quiet=True)
SKY = "cloud wind rain sun storm grey blue cold front mist hail drop the of over falls"
NO_REPLAY = {"when_continuing": {"replay": {"fraction": 0.0}, "distill": {"weight": 0.0}}}


@pytest.fixture(autouse=True)
def lab(retraining_base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    root = tmp_path / "lab"
    shutil.copytree(retraining_base, root)
    monkeypatch.chdir(root)
    return root


def keep(how: str) -> None:
    write_retraining(inbox={"path": "inbox", "keep_text": how}, **NO_REPLAY)


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def left(texts: list[str]) -> set[str]:
    """Which of these texts stand in any file under mlruns."""
    everything = b"".join(p.read_bytes() for p in Path("mlruns").rglob("*") if p.is_file() and p.suffix != ".db")
    return {text for text in texts if text.encode() in everything}


def remove_base() -> None:
    for name in ("fruit", "code"):
        Path(f"{name}.jsonl").unlink()
    shutil.rmtree("data/cache")


def test_ticks_go_on_when_all_text_is_gone(after_growth: Path) -> None:
    keep("until_promoted")
    Path("inbox/new.jsonl").rename("sea")
    sea, first = texts_of(Path("sea")), head()["versions"][1]["stages"][-1]
    assert set(head()["texts"]) == {"fruit", "code", first["data"]}
    remove_base()
    assert tick()["outcome"] == "idle"  # a setting counts for what was promoted before, too
    held = left(sea)
    assert 0 < len(held) < len(sea) / 2 and not BatchStore(Path("mlruns")).copies(first["batch"])

    write_corpus(Path("inbox/sky.jsonl"), SKY.split(), 5)
    record = head()
    record["texts"]["code"]["kept"] = None  # as evaluate.keep_heldout=false leaves it
    Path("mlruns/runs/tiny/head.json").write_text(json.dumps(record))
    second, text = tick_and_text()
    assert second["outcome"] == "promoted", text
    plan = json.loads(Path(second["plan"]).read_text(encoding="utf-8"))
    assert set(plan["drift"]) == {"fruit", first["data"], "all together"}
    assert "Its training text is gone: held-out text was compared." in plan["drift"]["fruit"]["words"]
    for name in ("fruit", first["data"]):  # each is held against what was kept of it
        assert f"✓ {name} loses" in text or f"{name} together lose" in text
    assert set(head()["best"]) == {"fruit", "code", first["data"], second["data"]}
    assert text.count("code is not measured: its text is gone, and no held-out text of it was kept.") == 2
    assert left(sea) == held and 0 < len(left(texts_of(Path("inbox/sky.jsonl")))) < 80

    Path("inbox/sky.jsonl").rename("sky")
    shutil.copy("sea", "inbox/sea.jsonl")
    assert tick()["reason"] == "nothing new has arrived"  # known by its hashes
    rollback("tiny", None, SILENT)
    assert head()["champion"] == 1
    shutil.copy("sky", "inbox/sky.jsonl")
    assert tick()["outcome"] == "idle"
    assert tick(reopen=second["data"])["candidate"] == second["candidate"]  # the same stage, bit for bit


def test_nothing_is_trained_or_judged_without_text_of_a_hub_that_is_down(
    after_growth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_code(name: str, *given: Any) -> Corpus:
        if name == "code":
            raise TryAgainError("the hub cannot serve it now")
        return read_corpus(name, *given)

    monkeypatch.setattr(texts, "read_corpus", without_code)
    write_corpus(Path("inbox/sky.jsonl"), SKY.split(), 5)
    before = head()["versions"], stages()
    with pytest.raises(TryAgainError, match=r"^distributions\.code: the hub"):
        tick("when_continuing.replay.fraction=0.5")  # held-out text was kept
    keep("always")
    record = head()
    record["texts"]["code"]["kept"] = None
    Path("mlruns/runs/tiny/head.json").write_text(json.dumps(record))
    with pytest.raises(TryAgainError, match=r"^distributions\.code: the hub"):
        tick()  # nothing is replayed
    with pytest.raises(TryAgainError, match=r"^distributions\.code: the hub"):
        consolidate("tiny", "code", 1, SILENT)
    assert (head()["versions"], stages()) == before


def test_a_batch_that_waits_needs_no_text_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    keep("never")
    sea = texts_of(arrive("sea"))
    with monkeypatch.context() as patch:
        patch.setattr(retrain_plan, "decide", lambda **known: Decision(Action.wait, {}, ["Wait: no answer yet: x."]))
        first = tick()
        assert first["outcome"] == "waiting" and not left(sea) and "open" not in head()
        patch.setattr("pipelines.retrain.batch.make_plan", None)  # nothing is looked at again
        few = arrive("sea", "few.jsonl", seed=79, documents=3)
        result, text = tick_and_text()
        assert (result["outcome"], result["batch"]) == ("waiting", first["batch"]) and "have joined batch" in text
        few.unlink()
        patch.setattr("pipelines.retrain.batch.make_plan", lambda *_: kill_self())
        assert fork(lambda: tick("gate.tolerance=0.02")).wait() == -9
    assert left(sea) == set(sea) and head()["open"] == [first["batch"]]
    Path("inbox/new.jsonl").rename("new")
    assert tick()["outcome"] == "idle" and not left(sea) and "open" not in head()


def test_text_that_a_kill_left_goes_at_the_next_tick_or_with_gc(
    after_growth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promoted, and killed before its text was removed: as a tick does that promotes while text is still kept."""
    batch = head()["versions"][-1]["stages"][-1]["batch"]
    sea, batches = texts_of(Path("inbox/new.jsonl")), BatchStore(Path("mlruns"))
    keep("until_promoted")
    assert left(sea) == set(sea) and gc(False, SILENT)["texts"] == []  # the last tick kept it
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: kill_self())
        assert fork(tick).wait() == -9
    assert batches.has_text(batch) and left(sea) == set(sea)
    shutil.copytree("mlruns", "killed")
    assert tick()["outcome"] == "idle" and 0 < len(left(sea)) < len(sea)
    assert not list(
        Path("data/cache/tokens").glob(f"{head()['texts'][head()['batches'][batch]['name']]['train_hash'][:16]}-*")
    )
    assert tick()["outcome"] == "idle"

    shutil.rmtree("mlruns")
    Path("killed").rename("mlruns")
    record = {**head(), "keep_text": "until_promoted"}
    Path("mlruns/runs/tiny/head.json").write_text(json.dumps(record))
    other = Path("mlruns/runs/other")
    other.mkdir()
    (other / "head.json").write_text(json.dumps({**record, "run": "other", "keep_text": "always"}))
    assert gc(True, SILENT)["texts"] == [] and left(sea) == set(sea)  # another run keeps it
    (other / "head.json").write_text(json.dumps({**record, "run": "other", "keep_text": "never"}))
    path = str(batches.path(batch))
    assert [row["path"] for row in gc(False, SILENT)["texts"]] == [path] and batches.has_text(batch)
    assert [row["path"] for row in gc(True, SILENT)["texts"]] == [path] and 0 < len(left(sea)) < len(sea)


def test_a_batch_whose_text_is_gone_is_reopened_from_the_inbox_alone(after_growth: Path) -> None:
    keep("until_promoted")
    assert tick()["outcome"] == "idle"
    rollback("tiny", 0, SILENT)
    stage = head()["versions"][-1]["stages"][-1]
    lines = Path("inbox/new.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("inbox/new.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    before = head()
    with pytest.raises(ConfigError, match=r"the text of batch-\w+ was removed .* 1 of its 160 documents are not in"):
        tick(reopen=stage["data"])
    assert head() == before
    Path("inbox/new.jsonl").write_text("".join(lines), encoding="utf-8")
    result = tick(reopen=stage["data"])
    assert (result["outcome"], result["candidate"]) == ("promoted", stage["key"])  # found: nothing is trained anew
    assert not BatchStore(Path("mlruns")).has_text(stage["batch"])
    record = head()["texts"][stage["data"]]
    held = {one.hash for one in HeldoutStore(Path("mlruns")).documents(record["kept"])}
    for line in lines[:8]:  # it still is known what learned from a document
        digest = Document(json.loads(line)["text"], "").hash
        found = document("tiny", digest, SILENT)
        row = {"distribution": stage["data"], "part": "heldout" if digest in held else "train", "document": digest}
        assert [row.items() <= holder.items() for holder in found["held_by"]] == [True]
        assert [row["stage"] for row in found["stages"]] == [stage["data"]] * (digest not in held)


def test_text_that_nobody_knows_of_is_garbage() -> None:
    batches = BatchStore(Path("mlruns"))
    batch = batches.add([Document("some text", "a"), Document("other text", "b")], [])
    folder = batches.path(batch).parent
    assert gc(False, SILENT)["texts"] == []  # it is young: a tick may be about to say so
    Path("mlruns/runs/tiny/head.json").touch()  # the store's own clock
    assert [s.path for s in find_garbage(Path("mlruns"), Path("data/cache"), time.time(), grace=-60).texts] == [folder]
    collect(Path("mlruns"), Path("data/cache"), time.time(), grace=-60)
    assert not folder.exists()


@pytest.mark.parametrize("how", ["until_promoted", "never"])
def test_what_is_removed_cannot_be_replayed(how: str) -> None:
    write_retraining(inbox={"path": "inbox", "keep_text": how})
    with pytest.raises(ConfigError, match=rf"^inbox.keep_text={how} .* when_continuing replays.*replay.fraction=0"):
        load_retraining("retrain.yaml")
    load_retraining("retrain.yaml", ["when_continuing.replay.source=generated"])
    write_retraining(inbox={"path": "inbox", "keep_text": how}, **NO_REPLAY)
    load_retraining("retrain.yaml")
    old_weights_train = ["routing.bundles=none", "stage_defaults.trunk.train=full"]
    with pytest.raises(ConfigError, match=r"when_continuing measures old weights on.*penalty.kind=none"):
        load_retraining("retrain.yaml", [*old_weights_train, "when_continuing.penalty.kind=ewc"])
    load_retraining("retrain.yaml", [*old_weights_train, "when_continuing.penalty.kind=l2"])
    load_retraining("retrain.yaml", ["inbox.keep_text=always", "when_continuing.replay.fraction=0.5"])
