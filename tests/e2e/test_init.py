"""``init`` on folders of somebody's own text, and its configuration as it stands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from lifelong_moe.config.initial.sizes import LEAST_STEPS, MOST_TOKENS, FolderText, sizes_for
from lifelong_moe.config.load import read_config
from lifelong_moe.data.text import sources
from tests.e2e.conftest import Cli
from tests.e2e.test_own_text import write_folder
from tests.tiny import VOCABULARIES

TINY = (
    "model={layers: 1, width: 16, heads: 2, kv_heads: 1, expert_width: 8, experts: 2, context: 32}",
    "model.document_mask=true", "stage_defaults.trunk.rank=2", "tokenizer.vocab_size=300",
    "stage_defaults.grow.sample_tokens=256", "stage_defaults.optim.batch_tokens=64", "evaluate.tokens=300",
    "stages[0].tokens=640", "stages[1].tokens=640", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "tracking.enabled=false",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("Meine Notizen"), "fruit", 30, ("md", "html"))
    write_folder(Path("src/pkg"), "code", 24, ("py",))
    Path("src/logo.png").write_bytes(b"\x89PNG")
    Path("src/old.c").write_bytes("/* Größe, und noch einiges mehr */".encode("cp1252"))
    return tmp_path


def test_what_init_writes_runs_as_it_stands(folder: Path, cli: Cli) -> None:
    result = cli("init", "Meine Notizen", "src", "--to", "own.yaml")
    assert result.code == 0, result.err
    assert "Meine-Notizen: 30 files: 30 used" in result.out
    assert "src: 26 files: 24 used, 1 neither UTF-8 nor UTF-16, 1 of a kind that is not read" in result.out
    assert "Next: lifelong-moe plan own.yaml, then lifelong-moe run own.yaml" in result.out
    text = Path("own.yaml").read_text(encoding="utf-8")
    assert "method: lifelong\n" in text and "# encoding: cp1252" in text
    config = read_config("own.yaml").config
    assert [stage.name for stage in config.stages] == ["Meine-Notizen", "src"]
    # The recommended method by one word, of which nothing else is written.
    assert config.routing.mixes and "bundles" not in text and config.stages[1].trunk.train == "deltas"
    planned = cli("plan", "own.yaml", "--json")
    assert planned.code == 0 and not any("forgotten" in one for one in json.loads(planned.out)["warnings"]), planned.err
    assert json.loads(planned.out)["files"]["src"]["used"] == 24
    ran = cli("run", "own.yaml", *TINY)
    assert ran.code == 0, ran.err
    assert "What became of each file: mlruns/runs/own/files.json" in ran.out
    assert "Report: mlruns/runs/own/report.html and report.json; pictures: mlruns/runs/own/figures/" in ran.out
    for name in ("report.html", "figures/loss_matrix.png", "figures/curves.png", "figures/expert_load.png"):
        assert Path("mlruns/runs/own", name).stat().st_size
    pictures = {path: path.stat().st_mtime_ns for path in Path("mlruns/runs/own").rglob("[!.]*.*")}
    again = cli("run", "own.yaml", *TINY)
    # Nothing to do: nothing is drawn or written.
    assert again.code == 0 and pictures == {path: path.stat().st_mtime_ns for path in pictures}


def test_folders_are_read_once(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    build = sources.build_corpus
    monkeypatch.setattr(sources, "build_corpus", lambda name, *more: (read.append(name), build(name, *more))[1])
    assert cli("init", "Meine Notizen", "src", "--to", "own.yaml").code == 0 and read == ["Meine-Notizen", "src"]
    planned = cli("plan", "own.yaml", "--json")  # finds all of it known
    assert planned.code == 0 and read == ["Meine-Notizen", "src"], planned.err


def test_mistakes_cost_a_line_and_nothing_is_written(folder: Path, cli: Cli) -> None:
    Path("there.yaml").write_text("run: x\n")
    Path("link.yaml").symlink_to("nowhere")
    Path("few").mkdir()
    Path("few/one.txt").write_text("a single text that is long enough")
    Path("short").mkdir()
    for i in range(12):
        Path(f"short/{i}.md").write_text(f"quick brown fox{i} jumped")
    Path("two").mkdir()
    for i in range(2):
        Path(f"two/{i}.md").write_text(f"some text number {i} of a few words")
    Path("none").mkdir()
    Path("${x}").mkdir()
    before = sorted(Path().rglob("*"))
    for arguments, reason in {
        ("src", "--to", "there.yaml"): "there.yaml exists already, and is not replaced",
        ("src", "--to", "link.yaml"): "link.yaml exists already",
        ("nothing",): "FOLDER=nothing: no such folder",
        ("src/logo.png",): "a file; name the folder that it is in",
        ("src", "src/pkg"): "one is within the other",
        ("src", "./src"): "the same folder twice",
        ("${x}",): "cannot stand in a configuration",
        ("src", "few"): "few: 1 distinct document(s) in 1 source unit(s) are too few to split",
        ("short",): "short: too few tokens: 42 of training text do not fill one block of model.context=128",
        ("src", "two"): "two: too few tokens",
        ("none",): "none: files=none/**/*: no such file, and nothing matches",
    }.items():
        result = cli("init", *arguments)
        assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err
    assert sorted(Path().rglob("*")) == before


def test_plan_takes_what_init_writes_of_little_text(folder: Path, cli: Cli) -> None:
    Path("little").mkdir()
    words = VOCABULARIES["fruit"].split()
    for i in range(4):
        Path(f"little/{i}.md").write_text(" ".join(words[i * j % len(words)] + str(j) for j in range(60)))
    Path("little/gone.md").symlink_to("nowhere")
    os.mkfifo("little/pipe.md")
    result = cli("init", "src", "little", "--to", "own.yaml")
    assert result.code == 0 and "little: 6 files: 4 used, 2 of a kind that is not read" in result.out, result.err
    planned = cli("plan", "own.yaml")
    assert planned.code == 0, planned.err


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("a b", "a-b"),
        ("Übersicht", "Ubersicht"),
        ("文書", "text"),
        ("_x.", "x"),
        ("x" * 99, "x" * 40),
        ("a: [b", "a-b"),
    ],
)
def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, name: str, becomes: str) -> None:
    monkeypatch.chdir(tmp_path)
    for parent in ("one", "two"):
        write_folder(Path(parent, name), "sea" if parent == "one" else "code", 24)
    result = cli("init", f"one/{name}", f"two/{name}", "--to", f"{name}.yaml", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert list(found["files"]) == [becomes, f"{becomes}-2"] and found["run"] == becomes
    written = yaml.safe_load(Path(f"{name}.yaml").read_text(encoding="utf-8"))
    assert written["distributions"][becomes]["files"].startswith("one/")


def of(train_bytes: int, documents: int = 100) -> FolderText:
    return FolderText(name="a", pattern="a", train_bytes=train_bytes, documents=documents)


def test_sizes_by_hand() -> None:
    small = sizes_for([of(60_000), of(6_000, documents=3)])
    assert (small.width, small.layers, small.context, small.clusters, small.vocabulary) == (64, 2, 128, 3, 512)
    # Four passes of 20,000 tokens in steps of 1,024; and at least twenty steps.
    assert small.tokens == (78 * 1024, LEAST_STEPS * 1024)
    large = sizes_for([of(3_000_000), of(400_000_000)])
    assert (large.width, large.layers, large.context, large.clusters, large.vocabulary) == (128, 4, 256, 8, 4096)
    assert large.tokens[1] == MOST_TOKENS // 2048 * 2048
