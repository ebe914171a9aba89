"""Step checkpoints that several processes write together, here threads: each its parts of divided tensors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lifelong_moe.errors import CorruptError, ResourceError, TryAgainError
from lifelong_moe.storage import directories
from lifelong_moe.training.callbacks import checkpoint as module
from lifelong_moe.training.callbacks.checkpoint import (
    PARTS,
    BackgroundCheckpointIO,
    SafeCheckpointIO,
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
)
from lifelong_moe.training.callbacks.divided import Divided, Held, Layout, Part, put_together, whole

WHOLE = torch.arange(48.0).reshape(4, 6, 2)
LAYOUTS = {
    "rows": Layout("x", (4, 6, 2), 0, (Held(0, 0), Held(1, 3))),
    "columns, the last has none": Layout("x", (4, 6, 2), 1, (Held(0, 0), Held(1, 4))),
    "columns, of others alone": Layout("x", (4, 6, 2), 1, (Held(1, 0), Held(2, 5))),
    "every second": Layout("x", (4, 6, 2), 0, (Held(0, 0, 2), Held(1, 1, 2))),
    "one has all": Layout("x", (4, 6, 2), 0, (Held(2, 0),)),
}
STEP = 3
LIMIT = 60.0


def parts_of(layout: Layout, tensor: Tensor = WHOLE) -> dict[int, Tensor]:
    """By rank, what it has."""
    found, length = {}, layout.shape[layout.dim]
    for held in layout.held:
        # Contiguous ones end where the next begins.
        ends = [one.begin for one in layout.held if one.begin > held.begin and held.step == 1]
        indices = torch.arange(held.begin, min(ends, default=length), held.step)
        found[held.rank] = tensor.index_select(layout.dim, indices)
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_indices_are_taken_from_any_parts(layout: Layout) -> None:
    stored = put_together(layout, {rank: {"x": part} for rank, part in parts_of(layout).items()})
    assert torch.equal(stored.whole(), WHOLE)
    assert torch.equal(whole([{"a": (stored, 1)}])[0]["a"][0], WHOLE)
    for one in (stored, Divided.of(WHOLE)):
        for dim, length in enumerate(WHOLE.shape):
            for indices in (range(length), range(1, length), range(1, length, 2), range(0)):
                expected = WHOLE.index_select(dim, torch.tensor([*indices], dtype=torch.int64))
                assert torch.equal(one.taken(dim, indices), expected)


def test_what_is_whole_stays_so() -> None:
    assert torch.equal(Divided.of(torch.tensor(3.0)).parts[0][1], torch.tensor(3.0))
    with pytest.raises(TypeError, match="str is no tensor"):
        Divided.of("x")


class Processes:
    """Processes that write checkpoints together."""

    def __init__(self, work: Path, number: int = 3) -> None:
        self.ios = [BackgroundCheckpointIO(work, keep=2) for _ in range(number)]
        self._told, self._barrier = "", threading.Barrier(number)

    def save(self, path: Path, layouts: dict[str, Layout], tensor: Tensor = WHOLE, limit: float = LIMIT) -> None:
        """Begin to write, in each of them."""
        given = {key: (layout, parts_of(layout, tensor)) for key, layout in layouts.items()}

        def one(rank: int) -> None:
            state = {key: Part(layout, parts.get(rank)) for key, (layout, parts) in given.items()}
            content = {**dict.fromkeys(PARTS, 0), "state_dict": state, "own": torch.full((2,), float(rank))}
            self.ios[rank].save_parts(content, path, rank, limit, lambda text: self._tell(rank, text))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.ios))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def finish(self) -> None:
        """Wait for all of them, the first last."""
        for io in reversed(self.ios):
            io.finish()

    def _tell(self, rank: int, text: str) -> str:
        if rank == 0:
            self._told = text
        self._barrier.wait(LIMIT)
        return self._told


def named() -> dict[str, Layout]:
    """All layouts, each of a tensor of its own."""
    return {key: Layout(key, one.shape, one.dim, one.held) for key, one in LAYOUTS.items()}


def test_each_process_writes_what_it_has(tmp_path: Path) -> None:
    processes, path = Processes(tmp_path), checkpoint_path(tmp_path, 0, STEP)
    processes.save(path, named())
    processes.finish()
    assert sorted(one.name for one in path.iterdir()) == [
        "manifest.json", "rank-0001.safetensors", "rank-0002.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    assert {*load_file(path / "rank-0002.safetensors")} == {"columns, of others alone", "one has all"}
    assert sum(tensor.numel() for tensor in load_file(path / "state.safetensors").values()) < 2 * WHOLE.numel()
    found = SafeCheckpointIO().load_checkpoint(path)
    assert found["own"].tolist() == [0, 0]
    assert all(torch.equal(found["state_dict"][key], WHOLE) for key in LAYOUTS)
    assert newest_checkpoint(tmp_path) == (0, path)


def test_older_ones_go_and_those_elsewhere_are_there_at_once(tmp_path: Path) -> None:
    processes, elsewhere = Processes(tmp_path / "work"), checkpoint_path(tmp_path / "own", 0, STEP)
    for step in range(1, 5):
        processes.save(checkpoint_path(tmp_path / "work", 0, step), named())
    processes.save(elsewhere, named())
    assert elsewhere.exists()
    processes.finish()
    assert [path.name[-1] for path in checkpoints(tmp_path / "work")] == ["3", "4"]


def test_training_goes_on_while_copies_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, original = threading.Event(), module.write_hashed

    def held(tensors: dict[str, Tensor], path: Path) -> Any:
        assert allowed.wait(LIMIT)
        return original(tensors, path)

    monkeypatch.setattr(module, "write_hashed", held)
    processes, path, tensor = Processes(tmp_path), checkpoint_path(tmp_path, 0, STEP), WHOLE.clone()
    processes.save(path, named(), tensor)
    tensor += 1
    assert checkpoints(tmp_path) == []
    allowed.set()
    processes.finish()
    assert all(torch.equal(one, WHOLE) for one in SafeCheckpointIO().load_checkpoint(path)["state_dict"].values())


def failing(monkeypatch: pytest.MonkeyPatch, file: str, error: Exception | None) -> None:
    """Let a file never be written."""
    original = module.write_hashed

    def write(tensors: dict[str, Tensor], path: Path) -> Any:
        if path.name == file and error is not None:
            raise error
        # One that is gone when it is written, as the folder is.
        return original(tensors, path if path.name != file else path.parent / "gone" / path.name)

    monkeypatch.setattr(module, "write_hashed", write)


def test_a_process_that_never_writes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(tmp_path)
    failing(monkeypatch, "rank-0002.safetensors", None)
    processes.save(checkpoint_path(tmp_path, 0, STEP), named(), limit=0.5)
    with pytest.raises(TryAgainError, match=r"^rank-0002.safetensors, a part of a step checkpoint, was not written"):
        processes.finish()
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_said_by_the_process_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(tmp_path)
    failing(monkeypatch, "rank-0001.safetensors", OSError(28, "No space left on device"))
    processes.save(checkpoint_path(tmp_path, 0, STEP), named(), limit=0.5)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        processes.ios[1].finish()
    with pytest.raises(TryAgainError):
        processes.ios[0].finish()
    processes.ios[2].finish()


def test_others_go_on_where_the_first_cannot_begin(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    processes = Processes(tmp_path / "a file")
    processes.save(checkpoint_path(tmp_path / "a file", 0, STEP), named())
    for io in processes.ios[1:]:
        io.finish()
    with pytest.raises(OSError, match="a file"):
        processes.ios[0].finish()


def test_a_file_counts_once_it_has_all_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rank-0001.safetensors"
    directories.write_file_for(path, lambda file: module.write_hashed({"x": WHOLE}, file))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(TryAgainError):
        directories.await_file(path, 0.1)
    path.write_bytes(data)
    entry = directories.await_file(path, 0.1)
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff")])
def test_a_part_that_is_gone_or_damaged_leaves_the_one_before(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    processes, said = Processes(tmp_path), list[str]()
    for step in (STEP, STEP + 1):
        processes.save(checkpoint_path(tmp_path, 0, step), named())
    processes.finish()
    damage(checkpoint_path(tmp_path, 0, STEP + 1) / "rank-0001.safetensors")
    assert newest_checkpoint(tmp_path, said.append) == (0, checkpoint_path(tmp_path, 0, STEP))
    assert len(said) == 1 and "rank-0001.safetensors" in said[0]


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change the layout of the rows."""
    return lambda state: state["rows"]["$parts"].update(changes)


def held(*places: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"rank": rank, "begin": begin, "step": step} for rank, begin, step in places]


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "parts that overlap": put(held=held((0, 0, 1), (1, 2, 1))),
    "a hole": put(shape=[5, 6, 2], held=held((0, 0, 1), (1, 4, 1))),
    "a part outside": put(held=held((0, 0, 1), (1, 4, 1))),
    "before the first": put(held=held((0, 0, 1), (1, -1, 1))),
    "no step": put(held=held((0, 0, 0), (1, 3, 1))),
    "a far step": put(held=held((0, 0, 10**18), (1, 3, 1))),
    "a part short": put(held=held((0, 0, 1))),
    "no part": put(held=[]),
    "a part twice": put(shape=[6, 6, 2], held=held((0, 0, 1), (0, 3, 1))),
    "a part of two tensors": lambda state: state.update(again=json.loads(json.dumps(state["rows"]))),
    "a shape too large": put(shape=[10**15, 6, 2]),
    "too large across": put(shape=[4, 10**15, 2]),
    "another dimension": put(dim=3),
    "a dimension before the first": put(dim=-1),
    "no dimension": put(shape=[], dim=0),
    "a rank that wrote nothing": put(held=held((0, 0, 1), (7, 3, 1))),
    "a file elsewhere": put(held=[{"rank": "../../rank-0001.safetensors", "begin": 0, "step": 1}]),
    "a name elsewhere": put(name="../x"),
    "a name that is no text": put(name=["rows"]),
    "a text": lambda state: state.update(rows={"$parts": "x"}),
    "an object more": put(more=1),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_parts_that_are_none_of_one_tensor_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]
) -> None:
    processes, path = Processes(tmp_path), checkpoint_path(tmp_path, 0, STEP)
    processes.save(path, named())
    processes.finish()
    state = json.loads((path / "state.json").read_text())
    change(state["state_dict"])
    sign(path, "state.json", json.dumps(state).encode())
    monkeypatch.setattr(Divided, "taken", None)  # before any number is read
    with pytest.raises(CorruptError, match="not a step checkpoint"):
        SafeCheckpointIO().load_parts(path)


def test_parts_of_no_numbers_or_of_two_kinds_are_refused() -> None:
    layout = Layout("x", (10**15, 0), 0, (Held(0, 0),))
    with pytest.raises(ValueError, match="is of shape"):
        put_together(layout, {0: {"x": torch.empty(10**15, 0)}})
    rows = LAYOUTS["rows"]
    parts = {rank: {"x": part.to(torch.float64 if rank else torch.float32)} for rank, part in parts_of(rows).items()}
    with pytest.raises(ValueError, match="several kinds"):
        put_together(rows, parts)


def sign(path: Path, name: str, data: bytes) -> None:
    """Write a file, and what the manifest says of it."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
