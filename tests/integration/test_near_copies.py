"""What a tick and a run do with text that is a near copy of what they know."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

import lifelong_moe.data.tokens.texts
import pipelines.shared.novelty
from lifelong_moe.config.load import build_config, read_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.store.stages import StageStore
from pipelines.run.prepare import prepare
from tests.retrain_lab import base_config, head, ledger, stages, tick, tick_and_text, write_retraining
from tests.tiny import VOCABULARIES, train, write_config


def texts_of(kind: str, seed: int, documents: int = 120) -> list[str]:
    """Longer than those of other tests: an edit must leave something of a document."""
    draw = random.Random(seed)
    vocabulary = VOCABULARIES[kind].split()
    return [f"{i} " + " ".join(draw.choices(vocabulary, k=draw.randint(60, 90))) for i in range(documents)]


def edited(texts: list[str], seed: int) -> list[str]:
    """Each with two other words."""
    draw, found = random.Random(seed), []
    for text in texts:
        words = text.split()
        for place in draw.sample(range(len(words)), 2):
            words[place] = "edited"
        found.append(" ".join(words))
    return found


def write(path: str, texts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def lab(retraining_base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it to work in."""
    shutil.copytree(retraining_base, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")


def planned() -> tuple[dict[str, Any], str]:
    """A tick that makes a plan and may train nothing, and what it printed."""
    result, text = tick_and_text("limits.tokens=1")
    assert result["outcome"] == "over budget"
    return result, text


def with_batch(batch: str) -> RunConfig:
    """The base with a batch beside it."""
    config = base_config()
    files = str(BatchStore(Path("mlruns")).path(batch))
    config["distributions"]["batch"] = {"files": files, "heldout_fraction": 0.15}
    config["evaluate"] = {**config["evaluate"], "also": ["batch"]}
    return build_config(OmegaConf.create(config))


def write_copied_fruit() -> None:
    """Training text with near copies of its held-out text."""
    fruit = texts_of("fruit", 1)
    write("fruit.jsonl", [*fruit, *edited(fruit, 2)])


@pytest.mark.usefixtures("lab")
def test_a_promoted_batch_with_two_edits_a_document_is_not_trained_on() -> None:
    first, new = texts_of("sea", 1), texts_of("sea", 3)
    write("inbox/first.jsonl", first)
    assert tick()["outcome"] == "promoted"
    before = stages()
    Path("inbox/first.jsonl").unlink()
    write("inbox/again.jsonl", edited(first, 2))
    said = "nothing new has arrived; 120 documents in the inbox are near copies of text seen before"
    result, text = tick_and_text()
    assert (result["outcome"], result["reason"]) == ("idle", said) and stages() == before
    assert "near copies of text seen before, and are left out" in text and ledger()[-1]["reason"] == said
    # Honest text of the same kind is not called a copy; copies of the base's text are, held out or not.
    fruit = [json.loads(line)["text"] for line in Path("fruit.jsonl").read_text(encoding="utf-8").splitlines()]
    write("inbox/new.jsonl", [*new, *edited(sorted(fruit, key=len)[-40:], 4)])
    result, text = planned()
    plan = json.loads(Path(result["plan"]).read_text(encoding="utf-8"))
    assert plan["near_copies"] == {"of_known_text": 160, "of_its_held_out_text": 0} == ledger()[-1]["near_copies"]
    assert "Near copies, which are left out: 160 of text seen before" in text and plan["documents"] == 120
    assert {document.text for document in BatchStore(Path("mlruns")).documents(result["batch"])} == set(new)


@pytest.mark.usefixtures("lab")
def test_copies_within_a_batch_are_kept_out_of_its_training_text() -> None:
    """Each document twice, once edited, each its own source: wherever the two are split apart, one is left out."""
    first = texts_of("sea", 1)
    write("inbox/both.jsonl", [*first, *edited(first, 2)])
    result, _ = planned()
    batch = pipelines.shared.novelty.read_texts(with_batch(result["batch"])).corpora["batch"]
    assert result["near_copies"] == {"of_known_text": 0, "of_its_held_out_text": len(batch.near_copies)}
    # A document's first or second word is its serial number, unless both were edited.
    held, trained = ({text.split()[0] for d in side for text in [d.text]} for side in (batch.heldout, batch.train))
    assert batch.near_copies and not (held & trained) - {"edited"}


def test_run_and_prepare_leave_them_out_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_copied_fruit()
    write("code.jsonl", texts_of("code", 2))
    config = write_config(base_config(stage_defaults={"tokens": 512}))
    printed = io.StringIO()
    found = prepare(read_config(config), Console(file=printed, width=200))["distributions"]
    number = found["fruit"]["near_copies"]
    assert number > 0 == found["code"]["near_copies"]
    said = f"fruit: {number} documents are near copies of held-out text and left out of training"
    assert said in printed.getvalue() and said in train(config)[1]
    first = StageStore(Path("mlruns")).get(head()["stages"][0])
    assert first.data["fruit"] == found["fruit"]["train_hash"] != first.split["fruit"]
    assert "Nothing to train" in train(config)[1]


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which was trained on near copies of its held-out text: the same text still is the same text."""
    monkeypatch.chdir(tmp_path)
    write_copied_fruit()
    write("code.jsonl", texts_of("code", 2))
    write_config(base_config(stage_defaults={"tokens": 512}))
    write_retraining()
    with monkeypatch.context() as patch:
        patch.setattr(
            lifelong_moe.data.tokens.texts, "without_near_copies", lambda corpora, others, folder: dict(corpora)
        )
        train()
    first = StageStore(Path("mlruns")).get(head()["stages"][0])
    assert first.data == first.split
    Path("inbox").mkdir()
    write("inbox/new.jsonl", texts_of("sea", 3))
    result, _ = planned()
    assert pipelines.shared.novelty.read_texts(with_batch(result["batch"])).corpora["fruit"].near_copies


def test_what_earlier_versions_committed_says_how_its_text_was_split() -> None:
    store = StageStore(Path(__file__).with_name("earlier") / "mlruns")
    stage = store.get(json.loads((store.root.parent / "runs/old/head.json").read_text())["stages"][0])
    assert stage.read_near_copies and stage.split == stage.data != {}
