"""What a store names is not what is read: its configuration may be somebody else's."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.load import build_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.data.formats.streams import open_file
from lifelong_moe.data.text import files
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.keys import text_sha256
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from pipelines.shared.workspace import read_data, remembered
from tests.e2e.conftest import Cli

COMMIT = "a" * 40
ELSEWHERE: dict[str, dict[str, Any]] = {
    "another folder": {"files": "../outside/*.jsonl"},
    "an absolute path": {"files": "{outside}/private.jsonl"},
    "a way out of a pattern": {"files": "mlruns/*/../../../outside/*.jsonl"},
    "a link": {"files": "link/*.jsonl"},
    "a file below a link": {"files": "**/private.jsonl"},
    "held-out text": {"files": "fruit.jsonl", "heldout_files": "../outside/private.jsonl"},
    "a dataset": {"hf": "evil/beacon", "revision": COMMIT},
    "a folder as a dataset": {"hf": "../outside", "revision": COMMIT},
    "a folder of ours as a dataset": {"hf": "link/inner", "revision": COMMIT},
    "a reader that loads pickles": {"hf": "pandas", "revision": COMMIT},
}
COMMANDS = {
    "inspect": ["inspect", "tiny"],
    "lineage": ["lineage", "tiny", "--document", "{document}"],
    "drop": ["drop", "tiny", "code"],
}


@pytest.fixture
def foreign(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Make a store whose configuration names something else, beside which this user has text of their own."""
    outside, work = tmp_path / "outside", tmp_path / "work"
    shutil.copytree(trained_once, work)
    (outside / "inner").mkdir(parents=True)
    for folder in (outside, outside / "inner"):
        lines = [json.dumps({"text": f"dear diary, the pin of card {i} is {i * 7919}"}) for i in range(200)]
        (folder / "private.jsonl").write_text("\n".join(lines))
    (work / "link").symlink_to(outside)
    monkeypatch.chdir(work)

    def opened(path: Path, *rest: Any) -> Any:
        assert not path.resolve().is_relative_to(outside), f"{path} was opened"
        return open_file(path, *rest)

    def resolved(host: Any, *_: Any, **__: Any) -> Any:
        pytest.fail(f"{host} was asked for")

    monkeypatch.setattr(files, "open_file", opened)
    monkeypatch.setattr(socket, "getaddrinfo", resolved)

    def change(source: dict[str, Any]) -> None:
        path = Path("mlruns/runs/tiny/head.json")
        head = json.loads(path.read_text())
        source = {key: value.replace("{outside}", str(outside)) for key, value in source.items()}
        head["config"]["distributions"]["fruit"] = {**source, "heldout_fraction": 0.1}
        path.write_text(json.dumps(head))

    return change


def served_text() -> PreparedData:
    """What commands read that are given no configuration."""
    head = require_head(Path("mlruns"), "tiny")
    return read_data(build_config(stored_config(head.config), is_stored=True), known=remembered(head, None))


def _heldout() -> str:
    """A held-out document of fruit."""
    kept = json.loads(Path("mlruns/runs/tiny/head.json").read_text())["texts"]["fruit"]["kept"]
    line = Path(f"mlruns/heldout/{kept}.jsonl").read_text().splitlines()[0]
    return text_sha256(json.loads(line)["text"])


@pytest.mark.parametrize("where", ELSEWHERE)
def test_text_that_a_store_names_elsewhere_is_not_read(
    where: str, foreign: Callable[[dict[str, Any]], None], cli: Cli
) -> None:
    foreign(ELSEWHERE[where])
    # `lineage` reads text in its own way; `inspect` and `drop` in the same one, so that each meets every other kind.
    for command in ("lineage", ("inspect", "drop")[list(ELSEWHERE).index(where) % 2]):
        result = cli(*(argument.format(document=_heldout()) for argument in COMMANDS[command]))
        # Held-out text that the store keeps serves, as where text was deleted.
        assert result.code == 0, result.err
    assert "diary" not in "".join(path.read_text(errors="ignore") for path in Path("data/cache").rglob("*.json"))


def test_a_tokenizer_that_a_store_names_elsewhere_is_not_read(
    foreign: Callable[[dict[str, Any]], None], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign({"files": "fruit.jsonl"})
    Path("../outside/tokenizer.json").write_text("{}")
    path = Path("mlruns/runs/tiny/head.json")
    head = json.loads(path.read_text())
    head["config"]["tokenizer"] = {"file": "../outside/tokenizer.json"}
    path.write_text(json.dumps(head))
    result = cli("inspect", "tiny")
    assert result.code == 0, result.err
    # Without a stage that has one, too.
    monkeypatch.setattr(StageStore, "find", lambda *_: None)
    with pytest.raises(ConfigError, match=r"tokenizer\.file=\.\./outside/tokenizer\.json: not below"):
        served_text()


def test_what_was_left_out_is_said(foreign: Callable[[dict[str, Any]], None], cli: Cli) -> None:
    foreign(ELSEWHERE["another folder"])
    result = cli(*(argument.format(document=_heldout()) for argument in COMMANDS["lineage"]))
    assert "fruit: only held-out documents could be searched" in " ".join(result.out.split())
    assert "files=../outside/*.jsonl: not below" in " ".join(result.out.split())


def test_one_measures_the_same_on_what_the_store_keeps(foreign: Callable[[dict[str, Any]], None], cli: Cli) -> None:
    found = Path("mlruns/runs/tiny/inspection.json")
    assert cli("inspect", "tiny").code == 0
    own = json.loads(found.read_text())
    foreign(ELSEWHERE["a dataset"])
    assert cli("inspect", "tiny").code == 0
    assert json.loads(found.read_text())["layers"] == own["layers"]


def test_kept_text_of_another_hash_is_not_tokenized_under_it(foreign: Callable[[dict[str, Any]], None]) -> None:
    foreign(ELSEWHERE["a dataset"])
    path = Path("mlruns/runs/tiny/head.json")
    head = json.loads(path.read_text())
    texts = head["texts"]
    # The cache is named by that hash, and may be shared with stores of one's own.
    texts["fruit"]["kept"] = texts["code"]["kept"]
    path.write_text(json.dumps(head))
    with pytest.raises(CorruptError, match=r"distributions\.fruit: its kept held-out text"):
        served_text()
