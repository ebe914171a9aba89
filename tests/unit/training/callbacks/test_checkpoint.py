from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.training.callbacks import checkpoint as module
from lifelong_moe.training.callbacks.checkpoint import (
    PARTS,
    STATE,
    BackgroundCheckpointIO,
    SafeCheckpointIO,
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
    set_earlier_aside,
)
from lifelong_moe.training.callbacks.flattened import flatten, restore


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    return restore(json.loads(json.dumps(flatten(value, tensors))), {0: tensors})


PLAIN: list[Any] = [
    None,
    True,
    -3,
    0.1,
    "text",
    [],
    {},
    (),
    [1, [2.5, None]],
    {"a": {"b": [1, (2, 3)]}},
    {1: "int key", "1": "str key", (0, 1): "tuple key", None: "none key", False: "bool"},
    {"$tensor": "t0", "plain": 1},
    {"$items": []},
    ((1,), [(2,)]),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_comes_back(value: Any) -> None:
    back = round_trip(value)
    assert back == value and type(back) is type(value)


def test_numbers_that_are_not_finite_come_back() -> None:
    assert round_trip(math.inf) == math.inf and math.isnan(round_trip([math.nan])[0])


def test_tensors_come_back() -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    value = {
        "weights": tied,
        "again": tied,
        "transposed": tied.t(),
        0: torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "nested": [(torch.tensor([True, False]),)],
    }
    back = round_trip(value)
    assert back.keys() == value.keys()
    for key in ("weights", "again", "transposed", 0, "half", "empty"):
        assert torch.equal(back[key], value[key]) and back[key].dtype == value[key].dtype  # type: ignore[index]
    assert back["nested"][0][0].tolist() == [True, False]


def test_what_is_kept_is_a_copy() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weight = torch.ones(3, requires_grad=True)
    flatten([weight], tensors)
    with torch.no_grad():
        weight.zero_()
    assert tensors["t0"].tolist() == [1, 1, 1] and not tensors["t0"].requires_grad


class Odd:
    pass


@pytest.mark.parametrize(
    "value",
    [Odd(), Odd, len, {1, 2}, b"bytes", np.float32(1), np.ones(2), 1j, Path("x")],
    ids=lambda value: type(value).__name__,
)
def test_what_could_only_be_pickled_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"plain data and tensors only, not {type(value).__name__}"):
        flatten({"a": [value]}, {})


def test_an_ordered_dictionary_is_plain() -> None:
    assert list(round_trip(OrderedDict(b=1, a=2)).items()) == [("b", 1), ("a", 2)]


def test_files(tmp_path: Path) -> None:
    io, path = SafeCheckpointIO(), checkpoint_path(tmp_path, 1, 25)
    io.save_checkpoint({**dict.fromkeys(PARTS, 0), "state": {"w": torch.ones(2)}, 3: (1,)}, path)
    assert path.name == "step-1-00000025"
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    back = io.load_checkpoint(path)
    assert back["state"]["w"].tolist() == [1, 1] and back[3] == (1,)
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)  # twice is no error
    assert checkpoints(tmp_path) == []


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        SafeCheckpointIO().save_checkpoint({"w": torch.ones(2), "odd": Odd()}, checkpoint_path(tmp_path, 0, 1))
    assert checkpoints(tmp_path) == []


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    io = SafeCheckpointIO()
    assert newest_checkpoint(tmp_path) is None
    for phase, step in ((0, 9), (0, 10), (1, 2)):
        io.save_checkpoint({"w": torch.full((2,), float(step))}, checkpoint_path(tmp_path, phase, step))
    assert newest_checkpoint(tmp_path) == (1, checkpoint_path(tmp_path, 1, 2))
    with (checkpoint_path(tmp_path, 1, 2) / "state.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == (0, checkpoint_path(tmp_path, 0, 10))
    assert len(said) == 1 and "step-1-00000002" in said[0]
    # It is kept, and its name is free: a commit leaves what has its name already.
    with pytest.raises(CorruptError):
        io.load_checkpoint(tmp_path / "damaged-step-1-00000002")
    for _ in range(2):
        io.save_checkpoint({**dict.fromkeys(PARTS, 0), "w": torch.ones(2)}, checkpoint_path(tmp_path, 1, 2))
        assert newest_checkpoint(tmp_path) == (1, checkpoint_path(tmp_path, 1, 2))
        (checkpoint_path(tmp_path, 1, 2) / "state.json").unlink()
        assert newest_checkpoint(tmp_path, said.append) == (0, checkpoint_path(tmp_path, 0, 10))


def test_only_damaged_ones_are_for_a_person_to_decide(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 1)
    SafeCheckpointIO().save_checkpoint({"w": torch.ones(2)}, path)
    (path / "state.json").unlink()
    with pytest.raises(CorruptError, match="none of its 1 step checkpoints verifies"):
        newest_checkpoint(tmp_path, lambda message: None)


def test_checkpoints_of_an_earlier_version_are_set_aside(tmp_path: Path) -> None:
    old, new, damaged = (checkpoint_path(tmp_path, 0, step) for step in (20, 10, 5))
    for path in (old, new, damaged):
        SafeCheckpointIO().save_checkpoint({"step": 1, "weights": torch.zeros(2)}, path)
    state = json.loads((old / STATE).read_text())
    del state["layout"]
    (old / STATE).write_text(json.dumps(state))
    (damaged / STATE).write_text("{")
    said: list[str] = []
    set_earlier_aside(tmp_path, said.append)
    assert checkpoints(tmp_path) == [damaged, new] and (tmp_path / f"earlier-{old.name}").exists()
    assert len(said) == 1 and f"{old} is of an earlier version" in said[0]
    assert newest_checkpoint(tmp_path) == (0, new)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a write in the background waits for."""
    allowed, original = threading.Event(), module.write_hashed

    def held(tensors: dict[str, Tensor], path: Path) -> Any:
        assert allowed.wait(60)
        return original(tensors, path)

    monkeypatch.setattr(module, "write_hashed", held)
    yield allowed
    allowed.set()


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, writing: threading.Event) -> None:
    io, weight = BackgroundCheckpointIO(tmp_path, keep=2), torch.zeros(2)
    io.save_checkpoint(
        {**dict.fromkeys(PARTS, 0), "w": weight, "turned": torch.ones(2, 3).t()}, tmp_path / "step-0-00000001"
    )
    weight += 1
    assert checkpoints(tmp_path) == []
    writing.set()
    io.finish()
    found = io.load_checkpoint(tmp_path / "step-0-00000001")
    assert found["w"].tolist() == [0, 0] and found["turned"].shape == (3, 2)
    for step in range(2, 6):
        io.save_checkpoint({"w": weight}, checkpoint_path(tmp_path, 0, step))
    io.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0-00000004", "step-0-00000005"]  # the newest


def test_a_second_write_waits_for_the_first(tmp_path: Path, writing: threading.Event) -> None:
    io = BackgroundCheckpointIO(tmp_path, keep=2)
    io.save_checkpoint({"w": torch.zeros(2)}, checkpoint_path(tmp_path, 0, 1))
    second = threading.Thread(target=lambda: io.save_checkpoint({}, checkpoint_path(tmp_path, 0, 2)))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    writing.set()
    second.join()
    io.finish()
    assert len(checkpoints(tmp_path)) == 2


def test_what_a_callback_saves_elsewhere_is_there_at_once_and_stays(tmp_path: Path) -> None:
    io = BackgroundCheckpointIO(tmp_path / "work", keep=1)
    paths = [checkpoint_path(tmp_path / "own", 0, step) for step in (1, 2, 3)]
    for path in paths:
        io.save_checkpoint({"w": torch.zeros(2)}, path)
        assert path.exists()
    assert checkpoints(tmp_path / "own") == paths


def test_an_error_of_writing_is_raised_once_by_what_comes_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def failed() -> BackgroundCheckpointIO:
        io = BackgroundCheckpointIO(tmp_path / "a file", keep=2)
        io.save_checkpoint({"w": torch.zeros(2)}, tmp_path / "a file" / "step-0-00000001")
        return io

    (tmp_path / "a file").touch()
    io = failed()
    with pytest.raises(OSError, match="a file"):
        io.save_checkpoint({"w": torch.zeros(2)}, checkpoint_path(tmp_path, 0, 2))
    io.finish()
    with pytest.raises(OSError, match="a file"), failed().finished():
        pass
    # What ended training comes first.
    io = failed()
    with pytest.raises(ZeroDivisionError), io.finished():
        raise ZeroDivisionError
    assert "was not written" in caplog.text
    io.finish()
