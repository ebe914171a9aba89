"""A store from somebody else: every kind of attack at every place of the one that :mod:`tests.full_store` makes.

:mod:`tests.watched` carries out a command on the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.plan.key import stored_key
from lifelong_moe.storage.keys import content_key
from lifelong_moe.store.record import StageRecord
from tests.full_store import GONE, settle
from tests.watched import Outcome, Scene, attempt, complaint, fingerprint, import_named, surroundings

ESCAPE = "\x1b[31mred\x9b1m"
"""Colours a terminal, in both forms that terminals know."""
MARKUP = "[/x][red]"
"""Markup of the library that prints; the first tag closes what was never opened."""
COMMANDS: dict[str, list[str]] = {
    "status": ["status", "tiny"],
    "runs": ["runs"],
    "report": ["report", "tiny"],
    "lineage": ["lineage", "tiny"],
    "lineage of an expert": ["lineage", "tiny", "--expert", "fruit/L0/E0"],
    "promote": ["promote", "tiny"],
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
    "lineage of a document": ["lineage", "tiny", "--document", hashlib.sha256(GONE.encode()).hexdigest()],
    "compare": ["compare", "compare.yaml"],
    "run of a checkpoint": ["run", "held.yaml"],
    "generate of a checkpoint": ["generate", "held", "a", "--max-new-tokens", "4"],
    "lineage of a checkpoint": ["lineage", "held"],
    "run that is recorded": ["run", "plain.yaml"],
    "drop that is recorded": ["drop", "plain", "fruit", "--no-gate"],
    "consolidate that is recorded": ["consolidate", "plain", "words", "gate.tolerance=9"],
    "tick": ["retrain", "retrain.yaml"],
    "export": ["export", "c.a.s0", "--to", "out"],
}
"""Every command that opens a store, on the runs of :func:`tests.full_store.make_store`."""
READ_WITH = {"retrain.yaml": "tiny.yaml", "compare.yaml": "arms.yaml"}
"""By file that a command names, another that this one names."""


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
        read = {*command, *(READ_WITH.get(word) for word in command)}
        return not self.is_of_user or self.place.partition(":")[0] in read

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


Attempt = Callable[[list[str], Path, Path], Outcome]


def carry_out(
    command: str, intact: Path, into: Path, *attacks: Attack, by: Attempt = attempt
) -> tuple[Outcome, str | None]:
    """Carry out a command on an attacked copy of a store, with fresh surroundings.

    Args:
        command: One of :data:`COMMANDS`.
        intact: Where :func:`make_store` worked.
        into: A directory for the copy; there is none yet.
        attacks: What is changed before.
        by: How: in a process of its own, or in this one.

    Returns:
        What the command left, and what is wrong with it; None if nothing is.
    """
    scene = Scene(into / "work", into / "outside")
    shutil.copytree(intact, scene.work, symlinks=True)
    scene.outside.mkdir()
    surroundings(scene.outside)
    for attack in attacks:
        attack.apply(scene)
    settle(scene.store)
    before = fingerprint(scene.outside)
    outcome = by(COMMANDS[command], scene.work, scene.outside)
    if any(attack.is_of_user for attack in attacks):
        return outcome, complaint(replace(outcome, forbidden=[]))
    wrong = complaint(outcome)
    return outcome, "it changed its surroundings" if not wrong and fingerprint(scene.outside) != before else wrong


def import_all(intact: Path) -> None:
    """Import in this process what the commands import, for the sake of all attempts to come."""
    with tempfile.TemporaryDirectory(dir=intact.parent) as folder:
        for command in COMMANDS:
            import_named(carry_out(command, intact, Path(folder, command))[0].imported)


STORED = ("mlruns", "data/cache")
"""Folders that may come from somebody else; :mod:`tests.full_store` makes both."""


def stored(work: Path) -> list[Path]:
    """All that is below them in a working directory."""
    return sorted(path for folder in STORED for path in (work / folder).rglob("*"))


def link_attacks(work: Path) -> Iterator[Attack]:
    """Replace each file and folder of an intact store by a link, and each file by a FIFO."""
    for path in stored(work):
        name = str(path.relative_to(work))
        target = "folder" if path.is_dir() else "file"
        yield Attack(name, "a link to the outside", _linked(name, target))
        yield Attack(name, "a link to nothing", _linked(name, "absent"))
        yield Attack(name, "a link to itself", _replaced(name, lambda place: place.symlink_to(place.name)))
        # What looks intact to a reader may still be written to elsewhere.
        yield Attack(name, "a link to a copy", _moved(name))
        if path.is_file():
            yield Attack(name, "a FIFO", _replaced(name, os.mkfifo))
    for name in ("work", "artifacts", "spool/new", "mlflow.db-journal", "mlflow.db-wal", "runs/new", "stages/new"):
        if not (work / "mlruns" / name).exists():
            yield Attack(f"mlruns/{name}", "a new link", _linked(f"mlruns/{name}", "folder"))


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        path = scene.work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return apply


def _linked(name: str, target: str) -> Callable[[Scene], None]:
    return lambda scene: _replaced(name, lambda place: place.symlink_to(scene.outside / target))(scene)


def _moved(name: str) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        kept = scene.outside / "copy"
        kept.mkdir()
        shutil.move(scene.work / name, kept / "it")
        (scene.work / name).symlink_to(kept / "it")

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
LARGE: dict[str, str] = {
    "2^24": str(1 << 24),
    "a milliard": str(10**9),
    "a billion": str(10**12),
    "a tiny number": "1e-300",
    "an enormous number": "1e300",
    "a late date": '"9999-12-31T23:59:59+00:00"',
}
"""Numbers and dates that may well be legal, and that no computation should have to bear. What a user writes may ask for
as much, so that only stores are attacked by them."""


@cache
def _json_places(work: Path) -> dict[str, list[tuple[tuple[str | int, ...], Any]]]:
    """By JSON file of an intact store, its places; read once, as each kind of value comes to all of them."""
    files = [path for path in stored(work) if path.suffix in (".json", ".jsonl", ".sig")]
    return {str(path.relative_to(work)): list(places(_load(path))) for path in files}


def json_attacks(work: Path, kinds: Collection[str] | None = None) -> Iterator[Attack]:
    """Put each hostile value at each place of each JSON file, and mend the hashes and keys that would show it.

    Also exchange each key of a stage for that of each other stage, itself included: cycles.

    Args:
        work: Where :func:`make_store` worked.
        kinds: Only attacks of these; None for all, some 400,000.
    """
    values = {kind: text for kind, text in (HOSTILE | LARGE).items() if kinds is None or kind in kinds}
    keys = sorted(json.loads(path.read_text())["key"] for path in work.glob("mlruns/stages/*/config.json"))
    for name, found in _json_places(work).items():
        for place, value in found:
            at = f"{name}:{'.'.join(map(str, place))}"
            for kind, text in values.items():
                yield Attack(at, kind, _put(name, place, text))
            for key in keys if (kinds is None or "a cycle" in kinds) and value in keys else []:
                if key != value:
                    yield Attack(at, "a cycle", _put(name, place, json.dumps(key)))
        for kind, content in (("nothing", b""), ("no text", b"\xff\xfe\0")):
            if kinds is None or kind in kinds:
                yield Attack(name, kind, _replaced(name, partial(Path.write_bytes, data=content)))


def database_attacks(work: Path) -> Iterator[Attack]:
    """Put each hostile value into each column of MLflow's tables, in all rows at once, and noise in place of it all."""
    name = "mlruns/mlflow.db"
    with closing(sqlite3.connect(work / name)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = [one for one in tables if database.execute(f"SELECT 1 FROM {one} LIMIT 1").fetchone()]
        columns = [(one, row[1]) for one in filled for row in database.execute(f"PRAGMA table_info({one})")]
    for table, column in columns:
        for kind, text in (HOSTILE | LARGE).items():
            if kind not in ("a deep list", "a lone surrogate", "not a number", "infinity", "a long number"):
                value = json.loads(text)
                value = text if isinstance(value, list | dict | bool) or kind == "a huge number" else value
                yield Attack(f"{name}:{table}.{column}", kind, _update(name, table, column, value))
    yield Attack(name, "nothing", _replaced(name, lambda place: place.write_text("")))
    yield Attack(name, "noise", _replaced(name, lambda place: place.write_bytes(bytes(range(256)) * 400)))


def _update(name: str, table: str, column: str, value: object) -> Callable[[Scene], None]:
    def apply(scene: Scene) -> None:
        with closing(sqlite3.connect(scene.work / name)) as database, database, contextlib.suppress(sqlite3.Error):
            database.execute(f"UPDATE {table} SET {column} = ?", (value,))  # fails where values must differ

    return apply


class Tree:
    """Attacks by their place, to draw such that no file with many places takes most of the draws."""

    def __init__(self, attacks: Iterable[Attack] = ()) -> None:
        self.own: list[Attack] = []
        self.below: dict[str, Tree] = {}
        for attack in attacks:
            node = self
            for step in re.split(r"[/:.]", attack.place):
                node = node.below.setdefault(step, Tree())
            node.own.append(attack)

    def draw(self, by: random.Random) -> Attack:
        """Each step of a path is as likely as those beside it."""
        step = by.choice([*self.below, *([None] if self.own else [])])
        return by.choice(self.own) if step is None else self.below[step].draw(by)


def configuration_attacks(work: Path) -> Iterator[Attack]:
    """Put each hostile value at each place of the configurations in a working directory."""
    for path in sorted(work.glob("*.yaml")):
        for place, _ in places(yaml.safe_load(path.read_text(encoding="utf-8"))):
            at = f"{path.name}:{'.'.join(map(str, place))}"
            for kind, text in HOSTILE.items():
                # A name is no secret, wherever it came from: a run may well be called after `${oc.env:USER}`.
                if kind != "a secret's name" or not at.endswith((":run", ":compare", ".data")):
                    yield Attack(at, kind, _put(path.name, place, text))


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
        path = scene.work / name
        value = _load(path)
        changed = _with(value, place)
        # Put in as text, since some values are not what Python's writer writes.
        lines = changed if path.suffix == ".jsonl" and isinstance(changed, list) else [changed]
        written = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(written.replace(json.dumps(MARK, ensure_ascii=False), text) + "\n", encoding="utf-8")
        _mend(path)
        if path.parent.parent == scene.store / "stages" and path.name == "config.json":
            _mend_keys(scene.store)

    return apply


def _with(value: Any, place: tuple[str | int, ...]) -> Any:
    if not place:
        return MARK
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[place[0]] = _with(value[place[0]], place[1:])  # type: ignore[index]
    return changed


def _mend(path: Path) -> None:
    """Let what keeps the hash of a changed file say its new one, as whoever changed it would."""
    if path.parent.name == "builtin":
        _, _, body = path.read_bytes().partition(b"\n")
        path.write_bytes(json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body)
    manifest = path.parent / "manifest.json"
    if path == manifest or not manifest.exists():
        return
    content = json.loads(manifest.read_text())
    files = content.get("files") if isinstance(content, dict) else None
    if isinstance(entry := files.get(path.name) if isinstance(files, dict) else None, dict):
        data = path.read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content))


def _mend_keys(store: Path) -> None:
    """Give stages the keys of what their records say now, children after parents, and let all others name these."""
    for _ in range(len(list(store.glob("stages/*")))):
        changed = dict(filter(None, map(_changed_key, store.glob("stages/*/config.json"))))
        if not changed:
            return
        for path in sorted(store.rglob("*"), reverse=True):
            if path.suffix in (".json", ".jsonl") and path.is_file():
                text = path.read_text(encoding="utf-8")
                for old, new in changed.items():
                    text = text.replace(old, new)
                path.write_text(text, encoding="utf-8")
                _mend(path)
            for old, new in changed.items():
                renamed = path.with_name(path.name.replace(old, new).replace(old[:16], new[:16]))
                # Where an attack made two stages alike, one folder has the name already.
                if renamed != path and not renamed.exists():
                    path = path.rename(renamed)


def _changed_key(path: Path) -> tuple[str, str] | None:
    """A record's key and the one that it should have; None if they are equal, or it is no record any more."""
    with contextlib.suppress(Exception):
        data = json.loads(path.read_text(encoding="utf-8"))
        record = StageRecord.from_json(data)
        identity = DataIdentity(
            record.data, record.tokenizer, record.architecture.vocab_size, record.architecture.bos_id
        )
        derived = None if record.derived is None else content_key(record.derived)
        found = derived or stored_key(data["spec"], record.spec, record.parent, identity)
        return None if found == record.key else (record.key, found)
    return None
