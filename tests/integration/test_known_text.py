"""A tick reads known text only to look for near copies, and takes what it took when it held all text in lists."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.data.arrivals.inbox_rows import ReadFile
from lifelong_moe.data.text import manifest
from lifelong_moe.data.text.documents import Document, normalized_hash
from lifelong_moe.data.text.known_hashes import KnownText
from lifelong_moe.data.text.near_copies import near_copies
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.retraining.decision import Action, Decision
from lifelong_moe.storage.remembered import SETTLED_SECONDS
from lifelong_moe.store.runs import RunRecord, require_head
from pipelines.retrain import arrivals, first_look
from pipelines.retrain import plan as retrain_plan
from pipelines.retrain.tick import Tick
from pipelines.shared import novelty
from pipelines.shared.output import SafeConsole
from pipelines.shared.places import ROOT
from tests.integration.test_near_copies import edited, texts_of, write
from tests.retrain_lab import arrive, head, ledger, stages, tick, tick_and_text

ARRIVED = Path("mlruns/runs/tiny/arrived.json")
FEW = ("trigger.min_tokens=100_000", "trigger.max_days=null")


@pytest.fixture(autouse=True)
def lab(retraining_base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, whose files count as settled as soon as they are written."""
    shutil.copytree(retraining_base, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    monkeypatch.setattr(arrivals, "SETTLED_SECONDS", -SETTLED_SECONDS)
    monkeypatch.setattr(manifest, "SETTLED_SECONDS", -SETTLED_SECONDS)
    return tmp_path / "lab"


class ReadError(Exception):
    """In place of text that may not be read."""


def refuse(patch: pytest.MonkeyPatch) -> None:
    """Let known text be read by nobody."""

    def refused(*_: object) -> None:
        raise ReadError

    patch.setattr(KnownText, "documents", refused)
    patch.setattr(KnownText, "hashes", refused)


def opened() -> Tick:
    """The run as a tick finds it."""
    found = load_retraining("retrain.yaml")
    return Tick(found, RunRecord(ROOT, "tiny"), require_head(ROOT, "tiny"), SafeConsole(io.StringIO()))


def taken_by_lists(one: Tick) -> tuple[set[Document], set[str], int]:
    """What earlier versions took: all known text in one list, each learned batch in it twice."""
    found = novelty.glance_at(one.retraining.settings.inbox, {}).inbox()
    texts = novelty.read_texts(one.config, one.known)
    assert found is not None
    new = {normalized_hash(document.text): document for document in found.documents}
    held = [document for documents in texts.heldout.values() for document in documents]
    seen = held + [d for corpus in texts.corpora.values() for d in (*corpus.train, *corpus.near_copies)]
    there = {batch: one.batches.has_text(batch) for batch in one.head.batches}
    seen += [document for batch in there if there[batch] for document in one.batches.documents(batch)]
    removed = set().union(*(one.batches.normalized(batch) for batch in there if not there[batch]))
    for digest in (*removed, *(normalized_hash(document.text) for document in seen)):
        new.pop(digest, None)
    left = list(new.values())
    either = zip(near_copies(left, seen, may_contain=True), near_copies(left, held, may_contain=False), strict=True)
    is_copy = [a or b for a, b in either]
    documents = {document for document, copy in zip(left, is_copy, strict=True) if not copy}
    copies = {document.hash for document, copy in zip(left, is_copy, strict=True) if copy}
    return documents, copies, len(found.documents) - len(left)


def taken(one: Tick) -> tuple[set[Document], set[str], int]:
    """What a tick takes now."""
    texts = novelty.read_texts(one.config, one.known)
    known = novelty.known_text(one.config, texts, one.head.batches, one.batches)
    new = novelty.new_documents(one.retraining.settings.inbox, known, one.batches)
    return set(new.documents), set(new.copies), new.known


def copies_of_everything() -> None:
    """Known documents of each kind come again: as they are, in capitals, and edited."""
    for name in ("fruit", "code"):
        texts = [json.loads(line)["text"] for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        write(f"inbox/again-{name}.jsonl", [*texts[:30], *map(str.upper, texts[30:50]), *edited(texts[50:], 5)])


def test_what_is_taken_is_what_lists_of_all_text_gave() -> None:
    first, second = texts_of("sea", 1), texts_of("sea", 3)
    write("inbox/first.jsonl", first)
    assert tick()["outcome"] == "promoted"  # a batch that is a distribution
    write("inbox/first.jsonl", texts_of("fruit", 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain_plan, "decide", lambda **known: Decision(Action.skip, {}, ["Skip: no."]))
        assert tick()["outcome"] == "skipped"  # one that is none
    copies_of_everything()
    write("inbox/second.jsonl", [*second, *edited(first, 2), *edited(texts_of("fruit", 8), 9), *first[:5]])
    one = opened()
    expected = taken_by_lists(one)
    assert taken(one) == expected and {document.text for document in expected[0]} >= set(second)
    assert len(expected[1]) > 200 and expected[2] > 100
    # Of text that was removed only equal documents are known.
    one.batches.remove_text(next(batch for batch, is_it in head()["batches"].items() if is_it["outcome"] == "skipped"))
    assert taken(one) == taken_by_lists(one) != expected


def test_a_list_of_files_and_a_part_of_a_batch_are_no_batch_that_is_known_whole() -> None:
    write("inbox/first.jsonl", texts_of("sea", 1))
    assert tick()["outcome"] == "promoted"
    one = opened()
    texts = novelty.read_texts(one.config, one.known)

    def learned(**settings: Any) -> list[str]:
        changed = {name: replace(source, **settings) for name, source in one.config.distributions.items()}
        config = replace(one.config, distributions=changed)
        return novelty.known_text(config, texts, one.head.batches, one.batches).learned

    assert learned() == list(one.head.batches)
    path = str(one.batches.path(*one.head.batches))
    assert not learned(files=[path, "other.jsonl"]) and not learned(max_bytes=100) and not learned(min_chars=5)


def test_too_little_new_text_is_counted_without_reading_known_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fruit", "code"):
        shutil.copy(f"{name}.jsonl", f"inbox/{name}.jsonl")
    arrive("sea", documents=12)
    first = tick(*FEW)  # makes the index
    refuse(monkeypatch)
    shutil.copy("inbox/new.jsonl", "inbox/more.jsonl")  # touched, and nothing new
    again, text = tick_and_text(*FEW)
    assert again["reason"] == first["reason"] and "332 documents in the inbox were seen before, or repeat" in text


def test_an_index_is_written_once_no_mistake_is_found_and_believed_by_its_own_files_alone(
    lab: Path, tmp_path: Path
) -> None:
    arrive("sea")
    before = {path for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(Exception, match="trainer: "):
        tick("trainer.accelerator=tpu")
    assert {path for path in Path().rglob("*") if path.is_file()} == before
    reason = tick(*FEW)["reason"]
    assert len(list(Path("data/cache/manifests").glob("*.hashes"))) == 2
    arrive("sea", "b.jsonl", seed=78, documents=1)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        assert tick(*FEW)["reason"] != reason
        # A copy of everything has other inodes: neither its index nor its rows are believed.
        shutil.copytree(lab, tmp_path / "copy")
        patch.chdir(tmp_path / "copy")
        with pytest.raises(ReadError):
            tick(*FEW)
    same = tick(*FEW)["reason"]
    os.chdir(tmp_path / "copy")
    assert tick(*FEW)["reason"] == same


def wait() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain_plan, "decide", lambda **known: Decision(Action.wait, {}, ["Wait: no answer yet: x."]))
        return tick()


def test_a_batch_that_waits_is_read_once() -> None:
    arrive("sea")
    assert wait()["outcome"] == "waiting"
    before = ledger(), stages()
    few = arrive("sea", "few.jsonl", seed=79, documents=3)
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        result, text = tick_and_text()
        assert result["outcome"] == "waiting" and "tokens have joined batch batch-" in text
        few.unlink()
        assert tick()["outcome"] == "waiting"
        patch.setattr(novelty, "glance_at_inbox", None)
        patch.setattr("pipelines.retrain.retrain.read_texts", None)
        assert tick()["outcome"] == "waiting"  # nothing has touched it since
        assert (ledger(), stages()) == before
        with pytest.raises(TypeError):
            tick(dry_run=True)  # which always looks


def test_a_tick_over_budget_reads_nothing_twice() -> None:
    arrive("sea")
    first = tick("limits.tokens=1000")
    assert first["outcome"] == "over budget"
    lines = ledger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(novelty, "glance_at_inbox", None)
        patch.setattr("pipelines.retrain.retrain.read_texts", None)
        again = tick("limits.tokens=1000")
    assert {**again, "at": 0} == {**first, "at": 0} and ledger() == lines
    Path("inbox/new.jsonl").rename("inbox/renamed.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)  # the same documents
        assert {**tick("limits.tokens=1000"), "at": 0} == {**first, "at": 0} and ledger() == lines
    # Another day, there may be fewer promotions in a week.
    plan = Path(first["plan"])
    facts = json.loads(plan.read_text(encoding="utf-8"))
    plan.write_text(json.dumps(facts | {"exceeded": [*facts["exceeded"], "limits.promotions_per_week=1 would be."]}))
    with pytest.raises(ReadError), pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        tick("limits.tokens=1000")
    assert tick()["outcome"] == "promoted"


def read_names(*overrides: str) -> tuple[str, list[str]]:
    """Why a tick is idle, and the files of the inbox that it has read."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = novelty.glance_at_inbox

        def glance(*given: Any) -> Any:
            seen = real(*given)
            found.extend(file.name for file in seen.files if file.documents is not None)
            return seen

        patch.setattr(novelty, "glance_at_inbox", glance)
        outcome = tick(*overrides)
    assert outcome["outcome"] == "idle"
    return str(outcome["reason"]), found


def test_a_file_of_the_inbox_is_read_once() -> None:
    arrive("sea", "a.jsonl", documents=12)
    assert read_names(*FEW)[1] == ["a.jsonl"]
    for number, name in enumerate("bc"):
        arrive("sea", f"{name}.jsonl", seed=80 + number, documents=12)
        reason, names = read_names(*FEW)
        assert names == [f"{name}.jsonl"]
        ARRIVED.rename("kept.json")
        Path("mlruns/runs/tiny/inbox.json").unlink()
        assert read_names(*FEW)[0] == reason  # as if all were read now
    Path("inbox/b.jsonl").write_text(Path("inbox/b.jsonl").read_text().replace("a", "o"))
    assert read_names(*FEW)[1] == ["b.jsonl"]
    Path("inbox/bad.jsonl").write_text("{\n" + Path("inbox/b.jsonl").read_text())
    quarantine = ("inbox.bad_lines=quarantine", *FEW)
    assert len(read_names(*quarantine)[1]) == 4  # another setting reads other documents
    arrive("sea", "d.jsonl", seed=90, documents=2)
    assert read_names(*quarantine)[1] == ["bad.jsonl", "d.jsonl"]  # bad lines are told of each time


@pytest.mark.parametrize("damage", ["not JSON", "half", "other rows", "negative", "a number that is none", "a folder"])
def test_damaged_rows_of_the_inbox_are_not_believed(damage: str) -> None:
    arrive("sea", "a.jsonl", documents=12)
    tick(*FEW)
    content = json.loads(ARRIVED.read_text())
    file = content["files"]["a.jsonl"]
    file |= {
        "other rows": {"hashes": file["hashes"][:-64]},
        "negative": {"tokens": [-2, *file["tokens"][1:]]},
        "a number that is none": {"copies": [12]},
    }.get(damage, {})
    text = {"not JSON": "{", "half": json.dumps({"files": {}})}.get(damage, json.dumps(content))
    ARRIVED.unlink()
    ARRIVED.mkdir() if damage == "a folder" else ARRIVED.write_text(text)
    arrive("sea", "b.jsonl", seed=78, documents=2)
    reason, names = read_names(*FEW)
    assert names == ["a.jsonl", "b.jsonl"] and "14 new documents are waiting" in reason


def test_near_copies_are_remembered_until_what_is_known_changes() -> None:
    fruit = [json.loads(line)["text"] for line in Path("fruit.jsonl").read_text(encoding="utf-8").splitlines()]
    write("inbox/copies.jsonl", edited(sorted(fruit, key=len)[-40:], 4))
    said = "nothing new has arrived; 40 documents in the inbox are near copies of text seen before"
    assert tick()["reason"] == said
    Path("inbox/empty.jsonl").touch()
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        assert tick()["reason"] == said
        with pytest.raises(ReadError):
            Path("inbox/other.jsonl").touch()
            tick("evaluate.tokens=2100", "distributions.code.heldout_fraction=0.2")


def test_near_copies_are_judged_again_beside_other_documents() -> None:
    fruit = [json.loads(line)["text"] for line in Path("fruit.jsonl").read_text(encoding="utf-8").splitlines()]
    write("inbox/copies.jsonl", edited(sorted(fruit, key=len)[-40:], 4))
    tick("trigger.min_tokens=1000")
    # What many sources share marks no copy, so that others could make these new.
    arrive("sea", "few.jsonl", documents=2)
    with pytest.raises(ReadError), pytest.MonkeyPatch.context() as patch:
        refuse(patch)
        tick("trigger.min_tokens=1000")
    assert "2 new documents are waiting" in tick("trigger.min_tokens=1000")["reason"]
    # The text of a distribution may change without a word of it in the configuration.
    Path("inbox/empty.jsonl").touch()
    with Path("fruit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "a pear that nobody has seen before, and one more of them"}) + "\n")
    judged = json.loads(ARRIVED.read_text())["judged_with"]
    tick("trigger.min_tokens=1_000_000")
    assert json.loads(ARRIVED.read_text())["judged_with"] != judged


def test_rows_are_those_of_the_file() -> None:
    row = first_look.Row("a" * 64, b"b" * 16, "source", 3, True)
    file = ReadFile.of((1, 2), {"bytes": 4, "sha256": "c" * 64}, 5, [row, row])
    assert file.rows() == [row, row]


def test_a_store_that_cannot_be_written_to_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(first_look, "write_atomic", full)
    arrive("sea", "a.jsonl", documents=12)
    first = tick(*FEW)["reason"]
    assert not ARRIVED.exists() and read_names(*FEW)[0] == first
