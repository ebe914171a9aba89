"""A committed stage needs none of its text again: runs whose files, and cache, are removed after each commit."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.load import read_config
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens.records import HeldoutStore
from lifelong_moe.errors import ConfigError, CorruptError, DataError, LifelongError
from lifelong_moe.store.garbage import find_garbage
from pipelines.inspect.inspect import inspect_stage
from pipelines.inspect.lineage import show_lineage
from pipelines.inspect.report import show_report
from pipelines.inspect.status import show_status
from pipelines.run.plan import plan
from pipelines.run.prepare import prepare
from pipelines.shared.options import InspectionRequest
from pipelines.upkeep.gc import gc
from tests.tiny import hashes, tiny_config, train, write_config, write_corpora

NAMES = ("fruit", "code", "sea")
BUNDLES: dict[str, Any] = {
    "model": {"document_mask": True},
    "routing": {"bundles": "cluster", "chunk_tokens": 4, "clusters": 2},
    "stage_defaults": {
        "trunk": {"train": "deltas", "rank": 2}, "replay": {"fraction": 0}, "distill": {"weight": 0}, "tokens": 512,
    },
}  # fmt: skip


def write_run(number: int, **sections: Any) -> str:
    """A configuration of the first so many stages, of bundles."""
    config = tiny_config(NAMES[:number])
    for name, value in (*BUNDLES.items(), *sections.items()):
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return write_config(config)


def forget(*names: str) -> None:
    """Remove distributions' text, and whatever was made of it outside of the store."""
    for name in names:
        Path(f"{name}.jsonl").unlink()
    shutil.rmtree("data/cache", ignore_errors=True)


def copy_heldout(owner: str, into: str) -> None:
    """Let a distribution's training text hold a near copy of what another one holds out."""
    source = SourceConfig(files=f"{owner}.jsonl", heldout_fraction=0.1)
    heldout = read_corpus(owner, source, Path("data/cache")).heldout
    text = next(document.text for document in heldout if len(document.text) > 100)
    with Path(f"{into}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": f"{text} yes"}) + "\n")


def run_forgetting(**sections: Any) -> tuple[list[dict[str, Any]], str]:
    """Stage after stage, each one's text removed after its commit; the reports, and what the last run printed."""
    reports = []
    for number, name in enumerate(NAMES, start=1):
        report, printed = train(write_run(number, **sections))
        reports.append(report)
        forget(name)
    return reports, printed


def told(action: Any, *args: Any) -> tuple[Any, str]:
    """What a command returns and prints."""
    printed = io.StringIO()
    return action(*args, Console(file=printed, width=200)), printed.getvalue()


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str], Path]:
    """A run of three stages whose text is never removed: its report, its weights, its text."""
    root = tmp_path_factory.mktemp("keeping")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_corpora(root)
        copy_heldout("fruit", into="code")
        report, printed = train(write_run(3))
        assert "code: 1 document is a near copy of held-out text" in printed
        return report, hashes(), root


@pytest.fixture
def text(tmp_path: Path, keeping: tuple[dict[str, Any], list[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the same text in it and nothing else."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copy(keeping[2] / f"{name}.jsonl", tmp_path)
    return tmp_path


def test_keys_weights_and_losses_are_those_of_a_run_that_keeps_its_text(
    text: Path, keeping: tuple[dict[str, Any], list[str], Path]
) -> None:
    reports, printed = run_forgetting()
    assert [stage["key"] for stage in reports[-1]["stages"]] == [stage["key"] for stage in keeping[0]["stages"]]
    assert hashes() == keeping[1]
    assert reports[-1]["loss_nats_per_token"] == keeping[0]["loss_nats_per_token"]
    assert reports[-1]["forgetting"] == keeping[0]["forgetting"] and reports[-1]["not_measured"] == []
    assert "fruit: its text is gone" in printed and "held-out text was kept" in printed

    before = {path: path.stat().st_mtime_ns for path in Path("mlruns").rglob("*") if path.is_file()}
    planned, printed = told(plan, read_config("tiny.yaml"))
    assert [row["action"] for row in planned["stages"]] == ["committed"] * 3 and "0 of 3 stages to train" in printed
    facts, _ = told(prepare, read_config("tiny.yaml"))
    assert [one["text_is_there"] for one in facts["distributions"].values()] == [False] * 3
    assert {path: path.stat().st_mtime_ns for path in before} == before

    again, printed = train("tiny.yaml")
    assert again == reports[-1] and "Nothing to train" in printed
    assert [row["state"] for row in told(show_status, "tiny")[0]["stages"]] == ["committed"] * 3
    assert told(show_report, ["tiny"])[0] == {"reports": [again]}
    assert [row["name"] for row in told(show_lineage, "tiny")[0]["stages"]] == list(NAMES)
    assert told(gc, True)[0]["bytes"] == 0
    seen, _ = told(lambda console: inspect_stage("tiny", None, InspectionRequest(tokens=64), console))
    assert list(seen["tokens"]) == list(NAMES)


def test_what_is_not_kept_is_measured_no_more(text: Path, keeping: tuple[dict[str, Any], list[str], Path]) -> None:
    """The near copy of held-out text that nobody knows any more stays left out: the stage that saw it is committed."""
    off = {"keep_heldout": False}
    reports = [train(write_run(number, evaluate=off))[0] for number in (1, 2)]
    shutil.copy("code.jsonl", "code.bak")
    forget("fruit", "code")
    report, printed = train(write_run(3, evaluate=off))
    assert not list(Path("mlruns").glob("heldout/*"))
    assert [stage["key"] for stage in report["stages"]] == [stage["key"] for stage in keeping[0]["stages"]]
    assert hashes() == keeping[1]
    assert [(one["distributions"], one["not_measured"]) for one in (*reports, report)] == [
        (["fruit"], []), (["fruit", "code"], []), (["sea"], ["fruit", "code"]),
    ]  # fmt: skip
    assert report["loss_nats_per_token"] == [[row[2]] for row in keeping[0]["loss_nats_per_token"]]
    assert report["forgetting"] == {"sea": 0.0} and report["backward_transfer"] is None
    assert "new stages are not measured on it" in printed and "tiny: no longer measured: fruit, code" in printed

    Path("code.bak").rename("code.jsonl")  # with the near copy of what fruit held out
    planned, printed = told(plan, read_config("tiny.yaml"))
    assert [row["key"] for row in planned["stages"]] == [stage["key"] for stage in report["stages"]]
    assert "code: 1 document is a near copy of held-out text" in printed
    back, _ = train("tiny.yaml")
    assert back["distributions"] == ["code", "sea"] and back["not_measured"] == ["fruit"]
    forget("code", "sea")
    assert train("tiny.yaml")[0] == back  # every stage was measured on both before


@pytest.mark.usefixtures("known_stages")
def test_text_that_a_new_stage_needs_is_asked_for(text: Path) -> None:
    """One line, and nothing is written: to replay text, to learn it otherwise, to fit what tells it apart."""
    train(write_run(1))
    forget("fruit")
    before = sorted(Path("mlruns").rglob("*"))
    replays = {"replay": {"fraction": 0.25}, "tokens": 512, "trunk": {"train": "deltas", "rank": 2}}
    fraction = {"fruit": {"files": "fruit.jsonl", "heldout_fraction": 0.2}}
    for sections, message in (
        ({"stage_defaults": replays}, "Stage code, which replays fruit, is not committed"),
        ({"routing": {"bundles": "cluster", "clusters": 3}}, "Stage code needs centroids of that text"),
        ({"seed": 1}, "Stage fruit, which learns fruit, is committed with another configuration"),
        ({"distributions": fraction}, ""),
        ({"run": "other"}, ""),
    ):
        with pytest.raises(DataError, match=rf"distributions\.fruit: files=fruit\.jsonl: no such file.*{message}"):
            train(write_run(2, **sections))
        assert sorted(Path("mlruns").rglob("*")) == before


@pytest.mark.usefixtures("known_stages")
def test_text_that_came_back_otherwise_is_refused(text: Path) -> None:
    train(write_run(1))
    forget("fruit")
    shutil.copy("sea.jsonl", "fruit.jsonl")
    with pytest.raises(ConfigError, match="run=tiny exists with other training text: fruit was"):
        train(write_run(2))


@pytest.mark.usefixtures("known_stages")
def test_a_tokenizer_whose_file_is_gone_is_not_that_of_another_name(text: Path) -> None:
    train(write_run(1))
    made = next(Path("data/cache/tokenizers").glob("*.json")).read_bytes()
    Path("given.json").write_bytes(made)
    named = {"tokenizer": {"file": "given.json"}, "run": "named"}
    report, _ = train(write_run(1, **named))
    Path("given.json").unlink()
    assert train(write_run(1, **named))[0] == report
    before = sorted(Path("mlruns").rglob("*"))
    for sections in ({"tokenizer": {"file": "givne.json"}}, {"tokenizer": {"file": "given.json"}, "run": "tiny"}):
        with pytest.raises(LifelongError, match=r"given\.json|givne\.json"):
            train(write_run(1, **{**named, **sections}))
    assert sorted(Path("mlruns").rglob("*")) == before


@pytest.mark.usefixtures("known_stages")
def test_a_kept_set_that_is_lost_is_told_and_one_that_nobody_names_is_garbage(text: Path) -> None:
    train(write_run(1))
    (kept,) = Path("mlruns/heldout").iterdir()
    unnamed = HeldoutStore(Path("mlruns")).add([Document("some text", "a")])
    far = 10.0**10  # everything is old by then
    assert [stored.key for stored in find_garbage(Path("mlruns"), Path("data/cache"), far).heldout] == []
    os.utime(HeldoutStore(Path("mlruns")).path(unnamed), (0, 0))  # the store's own clock is of its newest file
    assert [stored.key for stored in find_garbage(Path("mlruns"), Path("data/cache"), far).heldout] == [unnamed]
    forget("fruit")
    kept.unlink()
    with pytest.raises(CorruptError, match=f"{kept.name}: missing, but a run refers to it"):
        train(write_run(2))
