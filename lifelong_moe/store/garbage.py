"""What nothing refers to any more, and how it is removed. Torch-free.

Kept is whatever can be reached from the head of a run (all versions, plan, what it trains), from a live plan of a
retraining, or from a stage that is still young; and whatever these continue or borrow tensors from, and so on. A
comparison refers to runs by name, and their heads keep its stages. Held-out text is kept as long as a head or a live
plan names it.

Time comes from two clocks, because one may jump: this machine's, and the store's own, which is the newest file time
under the root. A thing is young, and a plan is live, unless both clocks say otherwise; hence the newest thing always is
young, and so is whatever claims to come from the future.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from lifelong_moe.data.text.batches import BatchStore
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.locks import locked
from lifelong_moe.storage.temporary import GRACE_SECONDS
from lifelong_moe.store.batch_text import read_heads, removable_texts, remove_batch_text

TOKENS_SECONDS = 30 * 24 * 3600.0
"""Tokens are kept for a month after they were opened last: whatever needs them can make them again."""
KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stored:
    """Something on disk that may be removed."""

    path: Path
    key: str
    """Of the stage that it is or belongs to; of a work directory the first digits only."""
    bytes: int
    changed: float
    """Newest file time, seconds since the epoch."""


@dataclass(frozen=True)
class Garbage:
    """What may be removed, dependants first, and what is spared only because it is young."""

    stages: list[Stored]
    evaluations: list[Stored]
    work: list[Stored]
    heldout: list[Stored]
    """Held-out documents that were kept."""
    tokens: list[Stored]
    """Tokenized text that nobody has opened for a month."""
    texts: list[Stored]
    """Text of batches: a folder where no run and no live plan knows of the batch, else the file of documents, which
    every run that knows of it lets go."""
    young: list[Stored]

    @property
    def bytes(self) -> int:
        """Disk that removing it frees."""
        kinds = (self.stages, self.evaluations, self.work, self.heldout, self.tokens, self.texts)
        return sum(stored.bytes for found in kinds for stored in found)


def mentioned(value: Any) -> set[str]:
    """Every content key that stands anywhere in plain JSON data, as a value or as a name."""
    if isinstance(value, str):
        return {value} if KEY.fullmatch(value) else set()
    if isinstance(value, Mapping):
        return set().union(*(mentioned(name) | mentioned(item) for name, item in value.items()))
    return set().union(*(mentioned(item) for item in value)) if isinstance(value, list) else set()


def reachable(roots: Iterable[str], needs: Mapping[str, Collection[str]]) -> set[str]:
    """Keys that the roots need, directly or not, themselves included; those without an entry need nothing."""
    found: set[str] = set()
    open_ = list(roots)
    while open_:
        key = open_.pop()
        if key not in found:
            found.add(key)
            open_ += needs.get(key, ())
    return found


def dependants_first(keys: Collection[str], needs: Mapping[str, Collection[str]]) -> list[str]:
    """An order in which what is left never needs what is gone, wherever one stops."""
    among = {key: [need for need in needs[key] if need in keys] for key in sorted(keys)}
    return list(TopologicalSorter(among).static_order())[::-1]


def find_garbage(root: Path, cache: Path, now: float, grace: float = GRACE_SECONDS) -> Garbage:
    """Look for what may be removed; changes nothing.

    Args:
        root: ``mlruns``.
        cache: ``data/cache``.
        now: Seconds since the epoch.
        grace: Seconds for which a thing is young.

    Raises:
        CorruptError: If a head, a plan or a stage cannot be read: what it needs is then unknown.
    """
    configs = dict(_stage_configs(root))
    stages = {config["key"]: _stored(path, config["key"]) for path, config in configs.items()}
    needs = {config["key"]: _needs(config) for config in configs.values()}
    clock = min(now, _newest(root, stages.values()))
    limit = clock - grace
    roots = _roots(root, clock, now)
    held = reachable(roots, needs)
    live = reachable(held | {key for key, stored in stages.items() if stored.changed > limit}, needs)
    untrained = {_untrained_key(config) for config in configs.values() if config["key"] in live}
    short = {key[:SHORT] for key in live}
    evaluations = [s for s in _evaluations(root) if s.key not in live | untrained]
    work = [s for s in _work(root) if s.key not in short]
    heldout = [s for s in _heldout(root) if s.key not in roots]
    unknown = [s for s in _batches(root) if s.key not in roots]
    return Garbage(
        stages=[stages[key] for key in dependants_first(stages.keys() - live, needs)],
        evaluations=[s for s in evaluations if s.changed <= limit],
        work=[s for s in work if s.changed <= limit],
        heldout=[s for s in heldout if s.changed <= limit],
        tokens=[s for s in _tokens(cache) if s.changed < clock - TOKENS_SECONDS],
        texts=[*(s for s in unknown if s.changed <= limit), *_removable_texts(root)],
        young=[
            *(stages[key] for key in sorted(stages.keys() & live - held)),
            *(s for s in (*evaluations, *work, *heldout, *unknown) if s.changed > limit),
        ],
    )


def collect(root: Path, cache: Path, now: float, grace: float = GRACE_SECONDS) -> Garbage:
    """Remove the garbage while no process works on any run or stage; returns what was removed.

    Raises:
        LockedError: If one does; nothing is removed then.
    """
    with ExitStack() as held:
        for path in sorted(root.glob("runs/*/")):
            held.enter_context(locked(path / ".lock", f"run {path.name}"))
        for path in sorted(root.glob("work/*/")):
            held.enter_context(locked(path / ".lock", f"stage {path.name}"))
        garbage = find_garbage(root, cache, now, grace)
        for stored in (*garbage.evaluations, *garbage.heldout):
            stored.path.unlink(missing_ok=True)
        heads = read_heads(root)
        for batch, head in removable_texts(heads, heads).items():
            remove_batch_text(root, cache, batch, head)
        folders = [stored for stored in garbage.texts if stored.path.is_dir()]
        for stored in (*garbage.work, *garbage.stages, *garbage.tokens, *folders):
            remove_directory(stored.path)
    return garbage


def _roots(root: Path, clock: float, now: float) -> set[str]:
    roots: set[str] = set()
    for path in root.glob("runs/*/head.json"):
        roots |= mentioned(_read(path))
    for path in root.glob("runs/*/plans/*.json"):
        plan = _read(path)
        made = _moment(plan, "made_at")
        if not _expired(plan, clock) and (made is None or made <= now + GRACE_SECONDS):  # else nobody can carry it out
            roots |= mentioned(plan)
    return roots


def _expired(plan: Any, clock: float) -> bool:
    """Whether a plan says that it is over; one that does not say is live."""
    expires = _moment(plan, "expires")
    return expires is not None and expires < clock


def _moment(plan: Any, name: str) -> float | None:
    """A time that stands in a plan, seconds since the epoch; None if none does."""
    text = plan.get(name) if isinstance(plan, dict) else None
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _stage_configs(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for directory in sorted(root.glob("stages/[!.]*/")):
        config = _read(directory / "config.json")
        if not isinstance(config, dict) or not {"key", "parent", "borrowed"} <= set(config):
            raise CorruptError(f"{directory / 'config.json'}: not the configuration of a stage; nothing is removed.")
        yield directory, config


def _needs(config: Mapping[str, Any]) -> set[str]:
    """Keys of the stages without which this one cannot be loaded."""
    return {*config["borrowed"].values(), *([config["parent"]] if config["parent"] else [])}


def _untrained_key(config: Mapping[str, Any]) -> str:
    """What evaluations of the untrained model that a first stage began from are stored under."""
    return content_key({"init": config.get("architecture"), "seed": (config.get("spec") or {}).get("seed")})


def _evaluations(root: Path) -> list[Stored]:
    found = []
    for path in sorted(root.glob("evaluations/[!.]*.json")):
        try:
            key = json.loads(path.read_text(encoding="utf-8"))["stage"]
        except (ValueError, KeyError, TypeError):
            continue  # damaged: it is made again when it is asked for
        found.append(_stored(path, key))
    return found


def _work(root: Path) -> list[Stored]:
    return [_stored(path, path.name) for path in sorted(root.glob("work/[!.]*/"))]


def _heldout(root: Path) -> list[Stored]:
    return [_stored(path, path.stem) for path in sorted(root.glob("heldout/[!.]*.jsonl"))]


def _batches(root: Path) -> list[Stored]:
    """All batches that were looked at, each under its hash."""
    manifests = {path.parent: _read(path) for path in sorted(root.glob("batches/[!.]*/manifest.json"))}
    return [_stored(path, manifest["hash"]) for path, manifest in manifests.items()]


def _removable_texts(root: Path) -> list[Stored]:
    """Text that runs let go and a crash, or another run that kept it, left."""
    heads, batches = read_heads(root), BatchStore(root)
    return [_stored(path, batch) for batch in removable_texts(heads, heads) for path in batches.copies(batch)]


def _tokens(cache: Path) -> list[Stored]:
    return [_stored(path, path.name) for path in sorted(cache.glob("tokens/[!.]*/"))]


def _stored(path: Path, key: str) -> Stored:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    stats = [p.stat() for p in files if p.name != ".lock"] or [path.stat()]
    return Stored(path, key, sum(s.st_size for s in stats), max(s.st_mtime for s in stats))


def _newest(root: Path, stages: Iterable[Stored]) -> float:
    """The store's own clock: when anything in it last changed."""
    heads = [p.stat().st_mtime for name in ("head.json", "ledger.jsonl") for p in root.glob(f"runs/*/{name}")]
    return max([*heads, *(stored.changed for stored in stages)], default=0.0)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError) as error:
        raise CorruptError(f"{path}: unreadable ({error}); what it needs is unknown, so nothing is removed.") from None
