"""Garbage collection: find and remove what nothing refers to any more. Torch-free.

Removed are:

- stages, unless a run's head (versions, plan, stages in training), a live retraining plan or a stage within its grace
  period reaches them, directly or as a parent or holder of borrowed tensors;
- evaluations, signatures and work directories of stages that are gone, and held-out text that no head and no live plan
  names;
- token shards, domains of their chunks, what generations said of held-out text, and what came of files, that were not
  opened for a month;
- half-written files of processes that are gone;
- the text of batches that no head and no live plan names, or that every run which knows the batch lets go.

Grace period: nothing younger than a day is collected, but for shards and text that runs let go. Age is measured by two
clocks, this machine's and the newest file time in the store, since either may jump: only what is old, and only plans
that have expired, by both clocks are collected. So the newest stage and files from the future are always kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from lifelong_moe.data.arrivals.batches import COPY, MANIFEST, BatchStore, read_manifest
from lifelong_moe.data.text.manifest import FOLDER, HASHES, ROWS
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.grammars import Key
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.locks import locked
from lifelong_moe.storage.plain import PlainError, from_plain, require_same
from lifelong_moe.storage.remembered import VERIFIED
from lifelong_moe.storage.stored import naming, read_json
from lifelong_moe.storage.temporary import GRACE_SECONDS, find_temporary
from lifelong_moe.store.batch_text import read_heads, removable_texts, remove_batch_text
from lifelong_moe.store.evaluations import read_evaluations

CACHE_SECONDS = 30 * 24 * 3600.0
"""A month since it was last opened; what is in the cache can be made again from its text."""
KEY = re.compile(r"[0-9a-f]{64}")
"""A content key: SHA-256 in hexadecimal."""
OURS = re.compile(r"(piece-)?[0-9a-f]{16}(-[0-9a-f]{16})?")
"""Names of what work, tokens and readings are kept in. Whatever has another name than ours is not ours to remove."""
_DOMAINS = re.compile(r"domains-[0-9a-f]{16}\.bin")


@dataclass(frozen=True)
class Stored:
    """A file or directory that may be removed."""

    path: Path
    key: str
    """Key of the stage that it is or belongs to; its first 16 digits for a work directory."""
    bytes: int
    changed: float
    """Newest file time, seconds since the epoch."""


@dataclass(frozen=True)
class Garbage:
    """What may be removed, dependent stages first, and what only its grace period keeps."""

    stages: list[Stored]
    evaluations: list[Stored]
    signatures: list[Stored]
    work: list[Stored]
    heldout: list[Stored]
    """Files of held-out documents."""
    tokens: list[Stored]
    """Directories of token shards, with all that is in them."""
    domains: list[Stored]
    """Files of domains beside the tokens of other shards."""
    readings: list[Stored]
    """Files of what generations said of held-out text."""
    manifests: list[Stored]
    """Files of what came of a distribution's files."""
    abandoned: list[Stored]
    """Half-written files of processes that are gone, which the next start removes too."""
    texts: list[Stored]
    """Text of batches: the whole directory of an unknown batch, else the file of documents that its runs let go."""
    young: list[Stored]

    @property
    def bytes(self) -> int:
        """Disk space that the removal frees."""
        kinds = (self.stages, self.evaluations, self.signatures, self.work, self.heldout, self.tokens, self.readings)
        more = (self.domains, self.manifests, self.abandoned, self.texts)
        return sum(stored.bytes for found in (*kinds, *more) for stored in found)


def mentioned(value: Any) -> set[str]:
    """All content keys anywhere in plain JSON data, as values or as names."""
    # Reading every key, whatever its field means, also keeps what later versions of the software refer to.
    if isinstance(value, str):
        return {value} if KEY.fullmatch(value) else set()
    if isinstance(value, Mapping):
        return set().union(*(mentioned(name) | mentioned(item) for name, item in value.items()))
    return set().union(*(mentioned(item) for item in value)) if isinstance(value, list) else set()


def reachable(roots: Iterable[str], needs: Mapping[str, Collection[str]]) -> set[str]:
    """The roots and all keys that they need, directly or not; keys without an entry need nothing."""
    found: set[str] = set()
    open_ = list(roots)
    while open_:
        key = open_.pop()
        if key not in found:
            found.add(key)
            open_ += needs.get(key, ())
    return found


def dependants_first(keys: Collection[str], needs: Mapping[str, Collection[str]]) -> list[str]:
    """Order keys so that each stands before those that it needs."""
    # A removal that is killed halfway then leaves no stage without its parent or a holder of its tensors.
    among = {key: [need for need in needs[key] if need in keys] for key in sorted(keys)}
    try:
        return list(TopologicalSorter(among).static_order())[::-1]
    except CycleError as error:
        around = ", ".join(key[:SHORT] for key in error.args[1])
        raise CorruptError(f"stages {around} need each other in a circle, so nothing is removed.") from None


def find_garbage(root: Path, cache: Path, now: float, grace: float = GRACE_SECONDS) -> Garbage:
    """Find what may be removed; changes nothing.

    Args:
        root: The ``mlruns/`` directory.
        cache: The ``data/cache/`` directory.
        now: Seconds since the epoch.
        grace: Grace period in seconds.

    Raises:
        CorruptError: If a head, a plan or a stage cannot be read: its references are then unknown.
    """
    nodes = list(_stages(root))
    stages = {node.stored.key: node.stored for node in nodes}
    needs = {node.stored.key: node.needs for node in nodes}
    # Old must be old by both clocks: one that jumped ahead alone makes nothing collectable.
    clock = min(now, _newest(root, stages.values()))
    limit = clock - grace
    roots = _roots(root, clock, now)
    held = reachable(roots, needs)
    # Age alone holds a stage that is committed, but not yet in the head of its run.
    live = reachable(held | {key for key, stored in stages.items() if stored.changed > limit}, needs)
    # A first stage also holds the evaluations of the untrained model, which are stored under no stage.
    untrained = {node.untrained for node in nodes if node.stored.key in live}
    short = {key[:SHORT] for key in live}
    evaluations = [s for s in _evaluations(root) if s.key not in live | untrained]
    signatures = [s for s in _signatures(root) if s.key not in live]
    work = [s for s in _work(root) if s.key not in short]
    heldout = [s for s in _heldout(root) if s.key not in roots]
    unknown = [s for s in _batches(root) if s.key not in roots]
    tokens = [s for s in _tokens(cache) if s.changed < clock - CACHE_SECONDS]
    gone = {s.path for s in tokens}
    return Garbage(
        stages=[stages[key] for key in dependants_first(stages.keys() - live, needs)],
        evaluations=[s for s in evaluations if s.changed <= limit],
        signatures=[s for s in signatures if s.changed <= limit],
        work=[s for s in work if s.changed <= limit],
        heldout=[s for s in heldout if s.changed <= limit],
        tokens=tokens,
        domains=[s for s in _domains(cache) if s.changed < clock - CACHE_SECONDS and s.path.parent not in gone],
        readings=[s for s in _readings(cache) if s.changed < clock - CACHE_SECONDS],
        manifests=[s for s in _manifests(cache) if s.changed < clock - CACHE_SECONDS],
        abandoned=[_stored(path, path.name) for top in (root, cache) for path in find_temporary(top)],
        texts=[*(s for s in unknown if s.changed <= limit), *_removable_texts(root)],
        young=[
            *(stages[key] for key in sorted(stages.keys() & live - held)),
            *(s for s in (*evaluations, *signatures, *work, *heldout, *unknown) if s.changed > limit),
        ],
    )


def collect(root: Path, cache: Path, now: float, grace: float = GRACE_SECONDS) -> Garbage:
    """Remove the garbage and return it; arguments as for :func:`find_garbage`.

    Raises:
        LockedError: If a process works on any run or stage; nothing is removed then.
    """
    with ExitStack() as held:
        # Locks come first: a run that went on after the search could refer to what is about to be removed.
        for path in sorted(root.glob("runs/*/")):
            held.enter_context(locked(path / ".lock", f"run {path.name}"))
        for path in sorted(root.glob("work/*/")):
            if OURS.fullmatch(path.name):
                held.enter_context(locked(path / ".lock", f"stage {path.name}"))
        garbage = find_garbage(root, cache, now, grace)
        cached = (*garbage.domains, *garbage.readings, *garbage.manifests)
        for stored in (*garbage.evaluations, *garbage.heldout, *cached):
            stored.path.unlink(missing_ok=True)
        heads = read_heads(root)
        # Text goes by what the heads say now, under all locks, and takes its token shards along.
        for batch, head in removable_texts(heads, heads).items():
            remove_batch_text(root, cache, batch, head)
        # Of the found text, directories of unknown batches remain.
        folders = [stored for stored in garbage.texts if stored.path.is_dir()]
        for stored in (*garbage.work, *garbage.stages, *garbage.tokens, *folders):
            remove_directory(stored.path)
        for stored in garbage.stages:
            (root / VERIFIED / f"{stored.key}.json").unlink(missing_ok=True)
        # After their stages: a stage that is left by a kill is still signed.
        for stored in garbage.signatures:
            stored.path.unlink(missing_ok=True)
    return garbage


def _roots(root: Path, clock: float, now: float) -> set[str]:
    """Keys that heads and live plans name."""
    roots: set[str] = set()
    for path in root.glob("runs/*/head.json"):
        roots |= mentioned(_read(path))
    for path in root.glob("runs/*/plans/*.json"):
        plan = _read(path)
        made = _moment(plan, "made_at")
        # A plan from the future is refused when it is to be carried out, so it holds nothing.
        if not _expired(plan, clock) and (made is None or made <= now + GRACE_SECONDS):
            roots |= mentioned(plan)
    return roots


def _expired(plan: Any, clock: float) -> bool:
    """Whether a plan has expired; one without a date never does."""
    expires = _moment(plan, "expires")
    return expires is not None and expires < clock


def _moment(plan: Any, name: str) -> float | None:
    """A time in a plan, seconds since the epoch; None if it is absent or no time."""
    text = plan.get(name) if isinstance(plan, dict) else None
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True)
class _StageNode:
    stored: Stored
    needs: set[str]
    """Keys of the stages without which this one cannot be loaded."""
    untrained: str
    """Key of the evaluations of the untrained model that this stage's chain began from, if it is a first stage."""


@dataclass(frozen=True)
class _Named:
    """The stages that a stage's record names."""

    key: Key
    parent: Key | None
    borrowed: Mapping[str, Key]
    """Empty where holders follow from the parent, and the parent's parents."""
    seed: int | None = None

    @classmethod
    def read(cls, config: Any) -> _Named:
        # Only this much of the record: a stage that a later version wrote still names its parent and holders.
        if not isinstance(config, dict):
            raise PlainError("not the record of a stage")
        spec = config.get("spec")
        seed = spec.get("seed") if isinstance(spec, dict) else None
        known = {name: config[name] for name in ("key", "parent", "borrowed") if name in config}
        known |= {"borrowed": {}} if "removed" in config and "borrowed" not in config else {}
        return from_plain(cls, known | {"seed": seed})


def _stages(root: Path) -> Iterator[_StageNode]:
    for directory in sorted(root.glob("stages/[!.]*/")):
        config = _read(directory / "config.json")
        with naming(directory / "config.json"):
            named = _Named.read(config)
            require_same("key", named.key[:SHORT], directory.name.rpartition("-")[2])
        needs = {*named.borrowed.values(), *filter(None, [named.parent])}
        init = {"init": config.get("architecture"), "seed": named.seed}
        yield _StageNode(_stored(directory, named.key), needs, content_key(init))


def _evaluations(root: Path) -> list[Stored]:
    found = []
    for path in sorted(root.glob("evaluations/[!.]*.json")):
        try:
            stored = read_evaluations(path)
        except CorruptError:
            continue  # A damaged file is replaced when its stage is evaluated again.
        if path.stem == stored.name:
            found.append(_stored(path, stored.stage))
    return found


def _signatures(root: Path) -> list[Stored]:
    return [_stored_file(path) for path in sorted(root.glob("signatures/*.sig")) if KEY.fullmatch(path.stem)]


def _work(root: Path) -> list[Stored]:
    return [_stored(path, path.name) for path in sorted(root.glob("work/*/")) if OURS.fullmatch(path.name)]


def _heldout(root: Path) -> list[Stored]:
    return [_stored_file(path) for path in sorted(root.glob("heldout/*.jsonl")) if KEY.fullmatch(path.stem)]


def _batches(root: Path) -> list[Stored]:
    """Directories of all batches, each under its hash."""
    folders = [path.parent for path in sorted(root.glob("batches/*/manifest.json")) if COPY.fullmatch(path.parent.name)]
    manifests = {path: read_manifest(path / MANIFEST) for path in folders}
    return [_stored(path, manifest.hash) for path, manifest in manifests.items()]


def _removable_texts(root: Path) -> list[Stored]:
    """Text that all runs have let go, but that a crash or a run that kept it until now left behind."""
    heads, batches = read_heads(root), BatchStore(root)
    return [_stored(path, batch) for batch in removable_texts(heads, heads) for path in batches.copies(batch)]


def _tokens(cache: Path) -> list[Stored]:
    return [_stored(path, path.name) for path in sorted(cache.glob("tokens/*/")) if OURS.fullmatch(path.name)]


def _domains(cache: Path) -> list[Stored]:
    found = sorted(cache.glob("tokens/*/domains-*.bin"))
    return [_stored_file(p) for p in found if OURS.fullmatch(p.parent.name) and _DOMAINS.fullmatch(p.name)]


def _readings(cache: Path) -> list[Stored]:
    return [_stored_file(path) for path in sorted(cache.glob("readings/*.safetensors")) if OURS.fullmatch(path.stem)]


def _manifests(cache: Path) -> list[Stored]:
    found = sorted(path for kind in (".json", HASHES, ROWS) for path in cache.glob(f"{FOLDER}/*{kind}"))
    return [_stored_file(path) for path in found if OURS.fullmatch(path.stem)]


def _stored_file(path: Path) -> Stored:
    # A folder there would be found out only after other files were removed.
    if not path.is_file():
        raise CorruptError(f"{path}: not a file, so nothing is removed.")
    return _stored(path, path.stem)


def _stored(path: Path, key: str) -> Stored:
    # Taking a lock, as collection itself does, may touch the lock file: no sign of work.
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    stats = [p.stat() for p in files if p.name != ".lock"] or [path.stat()]
    return Stored(path, key, sum(s.st_size for s in stats), max(s.st_mtime for s in stats))


def _newest(root: Path, stages: Iterable[Stored]) -> float:
    """The store's own clock: the newest file time of its runs and stages."""
    heads = [p.stat().st_mtime for name in ("head.json", "ledger.jsonl") for p in root.glob(f"runs/*/{name}")]
    return max([*heads, *(stored.changed for stored in stages)], default=0.0)


def _read(path: Path) -> Any:
    hint = "Its references are unknown, so nothing is removed; restore or delete it."
    try:
        return read_json(path)
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing. {hint}") from None
    except CorruptError as error:
        raise CorruptError(f"{error} {hint}") from None
