"""What may go, over stores made by hand: what is reachable, what is young, and by whose clock."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import CorruptError, LockedError
from lifelong_moe.storage.keys import content_key
from lifelong_moe.storage.locks import locked
from lifelong_moe.storage.temporary import temporary
from lifelong_moe.store.evaluations import StoredTogether
from lifelong_moe.store.garbage import collect, dependants_first, find_garbage, mentioned, reachable

DAY, NOW = 86400.0, 1_800_000_000.0
KEYS = {name: content_key(name) for name in "abcdefg"}
DATA = "9" * 64


def evaluation(stage: str) -> str:
    """Name of the file of a stage's evaluation."""
    return f"evaluations/{stage[:16]}-{DATA[:16]}.json"


class Store:
    """``mlruns`` and ``data/cache``, each file dated."""

    def __init__(self, path: Path) -> None:
        self.root, self.cache = path / "mlruns", path / "cache"

    def write(self, name: str, content: Any, age: float, size: int = 0) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((content if isinstance(content, str) else json.dumps(content)) + " " * size)
        os.utime(path, (NOW - age, NOW - age))
        return path

    def stage(self, name: str, age: float, parent: str = "", borrowed: str = "", **more: Any) -> None:
        config = {
            "key": KEYS[name], "parent": KEYS[parent] if parent else None,
            "borrowed": {f"w{i}": KEYS[one] for i, one in enumerate(borrowed)}, **more,
        }  # fmt: skip
        self.write(f"stages/{name}-{KEYS[name][:16]}/config.json", config, age)

    def head(self, *names: str, age: float = 0.0, run: str = "r") -> None:
        head = {"run": run, "method": "lifelong", "seed": 0, "config": {}, "plan": [], "names": []}
        head["stages"] = [KEYS[name] for name in names]
        self.write(f"runs/{run}/head.json", head, age)

    def found(self, now: float = NOW, **given: float) -> Any:
        return find_garbage(self.root, self.cache, now, **given)

    def names(self, now: float = NOW, **given: float) -> str:
        by_key = {key: name for name, key in KEYS.items()}
        return "".join(by_key[stored.key] for stored in self.found(now, **given).stages)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_keys_are_found_anywhere_and_nothing_else_is_one() -> None:
    a, b, c = (KEYS[name] for name in "abc")
    assert mentioned({a: [1, {"x": [b]}], "y": f"{c} and more", "z": c[:-1], "u": c.upper(), "n": None}) == {a, b}
    assert mentioned(a) == {a} and mentioned(5) == mentioned([]) == mentioned({}) == set()


def test_what_roots_need_is_reached_over_any_number_of_steps() -> None:
    needs = {"a": ["b"], "b": ["c", "a"], "d": ["e"]}
    assert reachable(["a", "x"], needs) == {"a", "b", "c", "x"}
    order = dependants_first({"a", "c", "d"}, {"a": ["c"], "c": ["z"], "d": ["a", "c"]})
    assert order == ["d", "a", "c"]  # what is left never needs what is gone


def test_what_a_head_reaches_by_parents_and_borrowed_tensors_is_kept(store: Store) -> None:
    store.stage("a", 9 * DAY)
    store.stage("b", 9 * DAY)
    store.stage("c", 9 * DAY, parent="a", borrowed="b")
    store.stage("d", 9 * DAY, parent="c")
    store.stage("e", 9 * DAY, parent="d", borrowed="ab")
    store.head("c")
    assert store.names() == "ed"
    store.head("e", run="other")
    assert store.names() == ""


def test_a_day_is_young_by_either_clock_and_keeps_what_it_needs(store: Store) -> None:
    store.stage("a", 9 * DAY)
    store.stage("b", 1.1 * DAY)
    store.stage("c", 0.9 * DAY, parent="a")
    store.head(age=0.0)
    assert store.names() == "b"
    assert [stored.key for stored in store.found().young] == sorted([KEYS["a"], KEYS["c"]])
    assert store.names(NOW + 100 * DAY) == "b"  # the store's own clock, its newest head, says that no time has passed
    assert store.names(NOW - 0.5 * DAY) == ""  # this machine's says that less has
    assert store.names(grace=2 * DAY) == ""
    all_ = store.names(grace=0.5 * DAY)
    assert sorted(all_) == ["a", "b", "c"] and all_.index("c") < all_.index("a")
    store.head(age=-30 * DAY)  # dated in the future
    assert store.names() == "b"


def test_the_newest_stage_and_the_ledger_are_the_store_s_clock_too(store: Store) -> None:
    store.stage("a", 5 * DAY)
    store.head(age=9 * DAY)
    assert store.names() == ""
    store.stage("b", 3.9 * DAY)
    assert store.names() == "a"
    store.write("runs/r/ledger.jsonl", "", 2 * DAY)
    assert sorted(store.names()) == ["a", "b"]


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        ({"expires": "2027-01-15T08:00:01Z"}, True),  # NOW is 2027-01-15T08:00:00Z
        ({"expires": "2027-01-15T07:59:59Z"}, False),
        ({"expires": "2027-01-15T10:00:01+02:00"}, True),
        ({"expires": "2027-01-15T07:59:59"}, False),  # without a zone it is UTC
        ({"expires": "soon"}, True),
        ({"expires": 5}, True),
        ({}, True),
        ({"made_at": "2027-01-16T08:00:00Z"}, True),  # a clock may be a day ahead
        ({"made_at": "2027-01-16T08:00:01Z"}, False),
    ],
)
def test_a_plan_that_can_be_carried_out_keeps_its_stages(store: Store, plan: dict[str, Any], kept: bool) -> None:
    store.stage("a", 9 * DAY)
    store.head(age=0.0)
    store.write("runs/r/plans/p.json", {**plan, "stages": [KEYS["a"]]}, 9 * DAY)
    assert store.names() == ("" if kept else "a")


def test_evaluations_and_work_go_with_their_stages(store: Store) -> None:
    spec, architecture = {"seed": 3}, {"width": 8}
    store.stage("a", 9 * DAY, spec=spec, architecture=architecture)
    store.head("a")
    untrained = content_key({"init": architecture, "seed": 3})
    for stage, age in ((KEYS["a"], 9), (untrained, 9), (KEYS["b"], 9), (KEYS["c"], 0.9)):
        store.write(evaluation(stage), {"stage": stage, "data": DATA, "result": {}}, age * DAY, size=100)
    together = StoredTogether(KEYS["b"], {DATA: {}})
    several = store.write(f"evaluations/{together.name}.json", vars(together), 9 * DAY)
    store.write("evaluations/damaged.json", "{", 9 * DAY)
    for name, age in ((KEYS["a"], 9), (KEYS["b"], 9), (KEYS["c"], 0.9)):
        store.write(f"work/{name[:16]}/step", "x" * 50, age * DAY)
    empty = store.root / "work" / KEYS["d"][:16]
    empty.mkdir()
    (empty / ".lock").touch()
    os.utime(empty, (NOW - 9 * DAY,) * 2)
    found = store.found()
    gone, young = evaluation(KEYS["b"]), evaluation(KEYS["c"])
    assert [stored.path for stored in found.evaluations] == [store.root / gone, several]
    assert sorted(stored.key for stored in found.work) == sorted([KEYS["b"][:16], KEYS["d"][:16]])
    assert {stored.path for stored in found.young} == {store.root / young, store.root / "work" / KEYS["c"][:16]}
    size = (store.root / gone).stat().st_size + several.stat().st_size
    assert found.bytes == size + 50 + empty.stat().st_size  # an empty folder has the size of a folder


def test_the_cache_stays_for_a_month_after_they_were_opened(store: Store) -> None:
    store.head(age=0.0)
    old, new = f"{'0' * 16}-{'1' * 16}", f"{'0' * 16}-{'2' * 16}"
    for name, age in ((old, 30.1), (new, 29.9), ("holiday pictures", 30.1)):
        path = store.cache / "tokens" / name / "tokens.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 7)
        os.utime(path, (NOW - age * DAY,) * 2)
        reading = store.cache / f"readings/{name}.safetensors"
        reading.parent.mkdir(exist_ok=True)
        reading.write_bytes(b"x" * 5)
        os.utime(reading, (NOW - age * DAY,) * 2)
    found = store.found()
    assert [stored.path.name for stored in found.tokens] == [old]
    assert [stored.path.stem for stored in found.readings] == [old] and found.bytes == 7 + 5
    collect(store.root, store.cache, NOW)
    assert {path.stem for path in store.cache.glob("*/*")} == {new, "holiday pictures"}


@pytest.mark.parametrize(
    "config",
    [
        *([], 5, {"key": KEYS["a"]}, {"key": KEYS["a"], "parent": None}, {"parent": None, "borrowed": {}}),
        {"key": "../" * 22, "parent": None, "borrowed": {}},
        {"key": KEYS["a"], "parent": 5, "borrowed": {}},
        {"key": KEYS["a"], "parent": None, "borrowed": {"w": "k"}},
    ],
)
def test_a_stage_that_is_none_stops_the_search(store: Store, config: Any) -> None:
    store.write("stages/x-1/config.json", config, 0)
    with pytest.raises(CorruptError, match=r"x-1/config\.json: "):
        store.found()


def test_holders_that_follow_from_parents_are_kept_with_them(store: Store) -> None:
    """No record names them."""
    for name, parent in ("a ", "ba", "cb", "d ", "ed"):
        content = {"key": KEYS[name], "parent": KEYS.get(parent), "removed": []}
        store.write(f"stages/{name}-{KEYS[name][:16]}/config.json", content, 9 * DAY)
    store.head("c")
    assert store.names() == "ed"


def test_stages_that_need_each_other_stop_the_search(store: Store) -> None:
    store.stage("a", 9 * DAY, parent="b")
    store.stage("b", 9 * DAY, parent="a")
    store.head(age=0.0)
    with pytest.raises(CorruptError, match="need each other in a circle"):
        store.found()


def test_what_was_found_is_removed_and_nothing_else_unless_somebody_works(store: Store) -> None:
    store.stage("a", 9 * DAY)
    store.stage("b", 9 * DAY, parent="a")
    store.head("a")
    store.write(evaluation(KEYS["b"]), {"stage": KEYS["b"], "data": DATA, "result": {}}, 9 * DAY)
    store.write(f"work/{KEYS['b'][:16]}/step", "x", 9 * DAY)
    pid = os.fork()  # POSIX locks do not exclude their own process
    if not pid:
        with locked(store.root / f"work/{KEYS['b'][:16]}/.lock", "stage"):
            (store.root / "locked").touch()
            os.read(os.pipe()[0], 1)
        os._exit(0)
    try:
        while not (store.root / "locked").exists():
            os.sched_yield()
        with pytest.raises(LockedError):
            collect(store.root, store.cache, NOW)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert len(list(store.root.glob("stages/*"))) == 2
    collect(store.root, store.cache, NOW)
    assert [path.name[0] for path in store.root.glob("stages/*")] == ["a"]
    assert list(store.root.glob("work/*")) == list(store.root.glob("evaluations/*")) == []


@pytest.mark.parametrize(
    "name",
    [
        "signatures/mine.sig",
        f"signatures/{KEYS['a'][:16]}.sig",
        f"signatures/.{KEYS['a']}.sig",
        "heldout/mine.jsonl",
        "evaluations/mine.json",
        f"evaluations/{KEYS['a'][:16]}-{DATA[:16]}.bak.json",
        "batches/mine/manifest.json",
        f"batches/{DATA[:16]}-mine/manifest.json",
        f"batches/{DATA[:16]}-mine/documents.jsonl",
        f"work/{KEYS['a'][:16]}.bak/file",
        f"../cache/tokens/{DATA[:16]}-mine/tokens.bin",
        f"../cache/readings/{DATA[:16]}-mine.safetensors",
    ],
)
def test_what_has_no_name_of_ours_stays(store: Store, name: str) -> None:
    """However old it is, and whatever it holds."""
    store.stage("b", 0)
    content: Any = {"stage": KEYS["a"], "data": DATA, "result": {}}
    if name.startswith("batches"):
        content = {"hash": DATA, "documents": [DATA], "files": []}
    path = store.write(name, content, 100 * DAY)
    collect(store.root, store.cache, NOW)
    assert path.exists()


@pytest.mark.parametrize(
    "name",
    [
        f"signatures/{KEYS['a']}.sig",
        f"heldout/{DATA}.jsonl",
        f"../cache/tokens/{'1' * 16}-{'2' * 16}/domains-{'3' * 16}.bin",
    ],
)
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_removed(store: Store, name: str) -> None:
    store.stage("b", 0)
    other = store.write(f"heldout/{KEYS['c']}.jsonl", "", 100 * DAY)
    store.write(f"{name}/file", "", 100 * DAY)
    with pytest.raises(CorruptError, match="not a file, so nothing is removed"):
        collect(store.root, store.cache, NOW)
    assert other.exists()


@pytest.mark.parametrize("kind", [".json", ".hashes", ".rows"])
def test_what_came_of_files_goes_after_a_month_and_pieces_of_tokens_too(kind: str, store: Store) -> None:
    store.head(age=0)
    (store.cache / "manifests").mkdir(parents=True)
    for age, name in ((40, "1" * 16), (20, "2" * 16), (40, "notours")):
        path = store.cache / "manifests" / f"{name}{kind}"
        path.write_text("{}")
        os.utime(path, (NOW - age * DAY, NOW - age * DAY))
    piece = store.cache / "tokens" / f"piece-{'3' * 16}-{'4' * 16}"
    piece.mkdir(parents=True)
    (piece / "tokens.bin").write_text("x")
    os.utime(piece / "tokens.bin", (NOW - 40 * DAY, NOW - 40 * DAY))
    found = store.found()
    assert [stored.key for stored in found.manifests] == ["1" * 16] and [one.path for one in found.tokens] == [piece]
    collect(store.root, store.cache, NOW)
    assert sorted(path.stem[0] for path in (store.cache / "manifests").iterdir()) == ["2", "n"] and not piece.exists()


def test_domains_go_after_a_month_and_the_tokens_that_are_read_stay(store: Store) -> None:
    store.head(age=0)
    read, unread = (store.cache / "tokens" / f"{digit * 16}-{'9' * 16}" for digit in "12")
    for folder, age in ((read, 1), (unread, 31)):
        folder.mkdir(parents=True)
        for name, one in (("tokens.bin", age), (f"domains-{'a' * 16}.bin", 31), ("domains-mine.bin", age)):
            (folder / name).write_bytes(b"xyz")
            os.utime(folder / name, (NOW - one * DAY,) * 2)
    fresh = read / f"domains-{'b' * 16}.bin"
    fresh.write_bytes(b"x")
    os.utime(fresh, (NOW, NOW))
    found = store.found()
    assert [stored.path for stored in found.domains] == [read / f"domains-{'a' * 16}.bin"]
    assert [stored.path for stored in found.tokens] == [unread] and found.bytes == 3 + 9
    collect(store.root, store.cache, NOW)
    assert sorted(path.name for path in read.iterdir()) == sorted(["tokens.bin", "domains-mine.bin", fresh.name])
    assert not unread.exists()


def test_what_killed_processes_left_is_shown_and_what_others_write_is_not(store: Store) -> None:
    store.head(age=0)
    for parent in (store.cache, store.root / "batches"):
        parent.mkdir(parents=True, exist_ok=True)
        with temporary(parent) as work:
            (work / "part").write_text("xyz")
            # Its lock is gone with the process: as after a kill.
            left = parent / work.name.replace(work.name[5:21], "0" * 16)
            left.mkdir()
            (left / "part").write_text("xyz")
            assert [stored.path for stored in store.found().abandoned if stored.path.parent == parent] == [left]
    assert len(store.found().abandoned) == 2 and store.found().bytes == 6
