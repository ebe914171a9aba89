"""A store from somebody else: one with something of everything, and every kind of attack at every place of it.

:mod:`tests.watched` carries out a command on the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lifelong_moe.tracking.spool import Spool
from pipelines.versions.drop import drop
from tests.retrain_lab import arrive, base_config, tick, write_retraining
from tests.tiny import CONTEXT, SEQUENCES, STEPS, train, write_config, write_corpora
from tests.watched import Outcome, Scene, attempt, complaint, fingerprint, import_as, surroundings

ESCAPE = "\x1b[31mred\x9b1m"
"""Colours a terminal, in both forms that terminals know."""
MARKUP = "[/x][red]"
"""Markup of the library that prints; the first tag closes what was never opened."""
COMMANDS: dict[str, list[str]] = {
    "status": ["status", "tiny"],
    "report": ["report", "tiny"],
    "lineage": ["lineage", "tiny"],
    "lineage of an expert": ["lineage", "tiny", "--expert", "fruit/L0/E0"],
    "rollback": ["rollback", "tiny"],
    "drop": ["drop", "tiny", "sea", "--no-gate"],
    "consolidate": ["consolidate", "tiny", "fruit"],
    "gc": ["gc"],
    "gc --apply": ["gc", "--apply"],
    "sync": ["sync"],
    "generate": ["generate", "tiny", "a", "--max-new-tokens", "4"],
    "inspect": ["inspect", "tiny"],
    "evaluate": ["evaluate", "tiny", "--data", "fruit.jsonl"],
    "run": ["run", "tiny.yaml"],
    "plan": ["plan", "tiny.yaml"],
    "retrain": ["retrain", "retrain.yaml", "--dry-run"],
}
"""Every command that opens a store, on the run of :func:`make_store`."""


@dataclass(frozen=True)
class Attack:
    """One change of a store."""

    place: str
    """File, and place in its JSON."""
    kind: str
    apply: Callable[[Scene], object]

    @property
    def is_of_user(self) -> bool:
        """Whether a configuration was changed: what a user writes may name other folders and addresses."""
        return ".yaml:" in self.place

    def concerns(self, command: list[str]) -> bool:
        """Whether a command may read what was changed: each may read the store, but a configuration only if named."""
        changed = self.place.partition(":")[0]
        return not self.is_of_user or changed in command or (changed, command[0]) == ("tiny.yaml", "retrain")

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


def make_store(root: Path) -> None:
    """Three stages, a derived one, two versions, a plan, a batch, and a record that waits for MLflow.

    Args:
        root: The current directory.
    """
    write_corpora(root)
    config = base_config()
    config["stage_defaults"]["tokens"] = STEPS * SEQUENCES * CONTEXT
    config["distributions"]["sea"] = {"files": "sea.jsonl", "heldout_fraction": 0.1}
    config["stages"] = [{"data": "fruit"}, {"data": "code"}, {"data": "sea"}]
    write_config(config)
    train()
    drop("tiny", "code", Console(quiet=True), ungated=True)
    write_retraining()
    Path("inbox").mkdir()
    arrive("noise")
    tick(dry_run=True)
    Spool(Path("mlruns"), "http://127.0.0.1:9").append({"do": "log_metrics", "run": "0" * 32, "metrics": []})


def carry_out(command: str, intact: Path, into: Path, *attacks: Attack) -> tuple[Outcome, str | None]:
    """Carry out a command on an attacked copy of a store, with fresh surroundings.

    Args:
        command: One of :data:`COMMANDS`.
        intact: Where :func:`make_store` worked.
        into: A directory for the copy; there is none yet.

    Returns:
        What the command left, and what is wrong with it; None if nothing is.
    """
    scene = Scene(into / "work", into / "outside")
    shutil.copytree(intact, scene.work, symlinks=True)
    scene.outside.mkdir()
    surroundings(scene.outside)
    for attack in attacks:
        attack.apply(scene)
    before = fingerprint(scene.outside)
    outcome = attempt(COMMANDS[command], scene.work, scene.outside)
    if any(attack.is_of_user for attack in attacks):
        return outcome, complaint(replace(outcome, forbidden=[]))
    wrong = complaint(outcome)
    return outcome, "it changed its surroundings" if not wrong and fingerprint(scene.outside) != before else wrong


def import_all(intact: Path) -> None:
    """Import in this process what the commands import, for the sake of all attempts to come."""
    with tempfile.TemporaryDirectory(dir=intact.parent) as folder:
        for command in COMMANDS:
            import_as(carry_out(command, intact, Path(folder, command))[0])


def link_attacks(root: Path) -> Iterator[Attack]:
    """Replace each file and folder of an intact ``mlruns/`` directory by a link, and each file by a FIFO."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        target = "folder" if path.is_dir() else "file"
        yield Attack(name, "a link to the outside", _linked(name, target))
        yield Attack(name, "a link to nothing", _linked(name, "absent"))
        yield Attack(name, "a link to itself", _replaced(name, lambda place: place.symlink_to(place.name)))
        # What looks intact to a reader may still be written to elsewhere.
        yield Attack(name, "a link to a copy", _moved(name))
        if path.is_file():
            yield Attack(name, "a FIFO", _replaced(name, os.mkfifo))
    for name in ("work", "evaluations", "inspection", "spool", "artifacts", "batches", "heldout"):
        if not (root / name).exists():
            yield Attack(name, "a new link", _linked(name, "folder"))


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        path = scene.store / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return apply


def _linked(name: str, target: str) -> Callable[[Scene], None]:
    return lambda scene: _replaced(name, lambda place: place.symlink_to(scene.outside / target))(scene)


def _moved(name: str) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        kept = scene.outside / "copy"
        kept.mkdir()
        shutil.move(scene.store / name, kept / "it")
        (scene.store / name).symlink_to(kept / "it")

    return apply


def nested(depth: int) -> str:
    """JSON text of a list within a list, and so on."""
    return "[" * depth + "]" * depth


HOSTILE: dict[str, str] = {
    "a way out": '"../../../outside/file"',
    "an absolute path": '"/etc/passwd"',
    "a separator": '"x/../../evil"',
    "an escape sequence": json.dumps(ESCAPE),
    "markup": json.dumps(MARKUP),
    "a secret's name": '"${oc.env:CANARY}"',
    "code": '"evil_router.Router"',
    "an address": '"http://127.0.0.1:9/"',
    "null": "null",
    "a list": "[]",
    "an object": "{}",
    "a deep list": nested(100_000),
    "a huge number": "1" + "0" * 400,
    "a long number": "7" * 5000,
    "a negative number": "-1",
    "not a number": "NaN",
    "infinity": "1e999",
    "true": "true",
    "an empty text": '""',
    "a lone surrogate": '"\\ud800"',
    "a NUL": '"a\\u0000b"',
    "a long text": json.dumps("x" * 100_000),
}
"""JSON texts to put at a place, by kind."""


def json_attacks(root: Path) -> Iterator[Attack]:
    """Put each hostile value at each place of each JSON file, and mend the hashes that would show it.

    Also exchange each key of a stage for that of each other stage, itself included: cycles.
    """
    keys = sorted(json.loads(path.read_text())["key"] for path in root.glob("stages/*/config.json"))
    for path in sorted([*root.rglob("*.json"), *root.glob("runs/*/*.jsonl"), *root.glob("spool/*/*.jsonl")]):
        name = str(path.relative_to(root))
        for place, value in places(_load(path)):
            for kind, text in HOSTILE.items():
                yield Attack(f"{name}:{'.'.join(map(str, place))}", kind, _put(name, place, text))
            if value in keys:
                for key in keys:
                    if key != value:
                        at = f"{name}:{'.'.join(map(str, place))}"
                        yield Attack(at, "a cycle", _put(name, place, json.dumps(key)))
        yield Attack(name, "nothing", _replaced(name, lambda place: place.write_text("")))
        yield Attack(name, "no text", _replaced(name, lambda place: place.write_bytes(b"\xff\xfe\0")))


def configuration_attacks(work: Path) -> Iterator[Attack]:
    """Put each hostile value at each place of the configurations in a working directory."""
    for path in sorted(work.glob("*.yaml")):
        for place, _ in places(yaml.safe_load(path.read_text(encoding="utf-8"))):
            at = f"{path.name}:{'.'.join(map(str, place))}"
            for kind, text in HOSTILE.items():
                # A name is no secret, wherever it came from: a run may well be called after `${oc.env:USER}`.
                if kind != "a secret's name" or not at.endswith((":run", ".data")):
                    yield Attack(at, kind, _put(f"../{path.name}", place, text))


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each place within JSON data, the whole first, with its value."""
    yield at, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*at, name))


MARK = "\ue000here\ue000"


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":  # of which JSON is a part, so that it can be written as JSON
        return yaml.safe_load(text)
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _put(name: str, place: tuple[str | int, ...], text: str) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        path = scene.store / name
        value = _load(path)
        changed = _with(value, place)
        # Put in as text, since some values are not what Python's writer writes.
        lines = changed if path.suffix == ".jsonl" and isinstance(changed, list) else [changed]
        written = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(written.replace(json.dumps(MARK, ensure_ascii=False), text) + "\n", encoding="utf-8")
        _mend(path)

    return apply


def _with(value: Any, place: tuple[str | int, ...]) -> Any:
    if not place:
        return MARK
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[place[0]] = _with(value[place[0]], place[1:])  # type: ignore[index]
    return changed


def _mend(path: Path) -> None:
    """Let the manifest beside a changed file say its new hash, as whoever changed it would."""
    manifest = path.parent / "manifest.json"
    if path == manifest or not manifest.exists():
        return
    content = json.loads(manifest.read_text())
    if isinstance(entry := content.get("files", {}).get(path.name), dict):
        data = path.read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content))
