"""Step checkpoints as safetensors and JSON, committed like stages: whole or not at all.

Where each of several processes has a part of some tensors, it writes a file of its own with these parts, and the first
process commits the files of all. Any number of processes reads them again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.directories import await_file, remove_directory, write_directory, write_file_for
from lifelong_moe.storage.files import rename
from lifelong_moe.storage.stored import parse_json, read_json
from lifelong_moe.storage.tensors import load_weights, write_hashed
from lifelong_moe.storage.verified import Entry, VerifiedDirectory, verify_directory
from lifelong_moe.training.callbacks.divided import parts_in, whole
from lifelong_moe.training.callbacks.flattened import Content, copied, flatten, restore

log = logging.getLogger(__name__)
TENSORS, STATE = "state.safetensors", "state.json"
OTHERS = re.compile(r"rank-([0-9]{4,6})\.safetensors")
"""Files of the processes after the first, whose parts are in :data:`TENSORS`; see :func:`rank_file`."""
NAME = re.compile(r"step-([0-9]-)?[0-9]{8,12}")
"""Of a checkpoint's directory; see :func:`checkpoint_path`. In earlier versions the phase was not part of it."""
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step")
"""What Lightning reads of every checkpoint."""
WRITER = "step checkpoint"
"""Name of the thread that writes one."""
LAYOUT = 2
"""Layout of optimizer states; since 2 a generation's experts share one state a matrix."""


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as directories of safetensors and JSON with a manifest, without pickle."""

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any | None = None) -> None:
        """Commit a checkpoint to the directory ``path``."""
        _write(*_plain(checkpoint), Path(path))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Content:
        """Verify and read a checkpoint; its tensors are on the CPU, from where Lightning moves them."""
        checkpoint: Content = whole(self.load_parts(path))
        return checkpoint

    def load_parts(self, path: Any) -> Content:
        """Verify a checkpoint and read it, but for the numbers of tensors.

        Tensors that were divided among processes are instances of :class:`Divided`.

        Raises:
            CorruptError: If it is damaged, or no checkpoint.
        """
        directory = Path(path)
        files = verify_directory(directory)
        state = parse_json(files.read(STATE), directory / STATE, finite=False)
        try:
            checkpoint = restore(state, _tensors(files))
            checkpoint.pop("layout", None)
            return {**checkpoint, **{name: checkpoint[name] for name in PARTS}}
        # A name that is no tensor's, a key that cannot be one, or something else than a mapping.
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{directory / STATE}: not a step checkpoint ({error!r}).") from None

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


class BackgroundCheckpointIO(SafeCheckpointIO):
    """The same, written by a thread from a copy in the CPU's memory while training goes on: one at a time.

    A checkpoint is there when it is whole, as before; a kill in between leaves those before it.

    One that a callback of the user's own saves elsewhere is there at once, and nothing beside it is removed.

    Args:
        work: The stage's folder.
        keep: After each one in it, older ones than the newest ``keep`` are removed.
    """

    def __init__(self, work: Path, keep: int) -> None:
        self.work, self.keep = work, keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any | None = None) -> None:
        """Copy a checkpoint, and begin to write it once the one before is written.

        Raises:
            ResourceError: If the disk was full for the one before.
        """
        self.finish()
        if Path(path).parent != self.work:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._begin(partial(_write, *_plain(checkpoint), Path(path)))

    def save_parts(self, checkpoint: Content, path: Path, rank: int, limit: float, tell: Callable[[str], str]) -> None:
        """The same in each of several processes, which have parts of some tensors.

        Args:
            checkpoint: All but the first process write their parts of it alone.
            path: Where the first process commits all of them.
            rank: Of this process.
            limit: Seconds after which the first gives up another whose file does not grow.
            tell: Returns, in each process, the text that the first has given it.

        Raises:
            ResourceError: If the disk was full for the one before.
        """
        self.finish()
        parts = [*parts_in(checkpoint)]
        if rank == 0:
            others = sorted({held.rank for part in parts for held in part.layout.held} - {0})
            folder = SimpleQueue[str]()
            write = partial(_write_all, *_plain(checkpoint), path, partial(await_file, limit=limit), others, folder)
            self._begin(write, keeps=path.parent != self.work)
            tell(folder.get())
        else:
            own = {part.layout.name: copied(part.here) for part in parts if part.here is not None}
            # Empty if it could not be made.
            if (name := tell("")) and own:
                file = path.parent / name / rank_file(rank)
                self._begin(partial(write_file_for, file, partial(write_hashed, own)), keeps=True)
        if path.parent != self.work:
            self.finish()

    def _begin(self, write: Callable[[], object], keeps: bool = False) -> None:
        # Not a daemon: the process waits for it at its end. SIGTERM stays blocked in it where it is in the process.
        self._writer = threading.Thread(target=self._run, args=(write, keeps), name=WRITER)
        self._writer.start()

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            ResourceError: If the disk was full. Each error is raised once.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Context that ends when nothing is being written; an error within it comes before one of writing."""
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except (Exception, KeyboardInterrupt) as error:
                log.warning("a step checkpoint was not written: %s", error)
            raise
        self.finish()

    def _run(self, write: Callable[[], object], keeps: bool) -> None:
        try:
            write()
            # After the commit, so that there always is one.
            for old in [] if keeps else checkpoints(self.work)[: -self.keep]:
                self.remove_checkpoint(old)
        except BaseException as error:  # whatever it is, it is the training's to raise
            self._error = error


def _plain(checkpoint: Content) -> tuple[dict[str, Tensor], str]:
    """Copies of a checkpoint's tensors, and the rest of it as JSON."""
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps({"layout": LAYOUT, **flatten(checkpoint, tensors)})


def _write(tensors: dict[str, Tensor], text: str, path: Path) -> None:
    write_directory(
        path,
        {
            TENSORS: lambda file: write_hashed(tensors, file),
            STATE: lambda file: file.write_text(text, encoding="utf-8"),
        },
    )


def _write_all(
    tensors: dict[str, Tensor],
    text: str,
    path: Path,
    await_other: Callable[[Path], Entry],
    others: Sequence[int],
    folder: SimpleQueue[str],
) -> None:
    """Write a checkpoint together with other processes.

    Args:
        tensors: Those of this process.
        text: The rest.
        path: Where it is committed.
        await_other: Waits for the file of another process.
        others: Ranks that write one.
        folder: Takes the name of the folder to write in, beside ``path``; an empty one if it cannot be made.
    """

    def begin(file: Path) -> None:
        file.write_text(text, encoding="utf-8")
        folder.put(file.parent.name)

    own = {STATE: begin, TENSORS: lambda file: write_hashed(tensors, file)}
    try:
        write_directory(path, {**own, **dict.fromkeys(map(rank_file, others), await_other)})
    finally:
        folder.put("")


def _tensors(files: VerifiedDirectory) -> dict[int, dict[str, Tensor]]:
    """By rank, the tensors that it has written."""
    numbers = {name: int(found[1]) for name in files.manifest.files if (found := OTHERS.fullmatch(name))}
    return {0: load_weights(files, TENSORS)} | {rank: load_weights(files, name) for name, rank in numbers.items()}


def rank_file(rank: int) -> str:
    """Name of the file of a process after the first."""
    return f"rank-{rank:04d}.safetensors"


def checkpoint_path(work: Path, phase: int, step: int) -> Path:
    """Directory of the checkpoint after ``step`` steps of a phase."""
    # Zero-padded, so that names sort by age. Phases are at most three.
    return work / f"step-{phase}-{step:08d}"


def step_of(path: Path) -> int:
    """Steps of its phase that were taken before a checkpoint."""
    return int(path.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """Step checkpoints of a stage, oldest first."""
    return sorted(path for path in work.glob("step-*") if NAME.fullmatch(path.name))


def set_earlier_aside(work: Path, warn: Callable[[str], None] = log.warning) -> None:
    """Rename checkpoints with the optimizer layout of an earlier version, so that their stage begins again."""
    for path in checkpoints(work):
        try:
            state = read_json(path / STATE, finite=False)
        except (FileNotFoundError, CorruptError):
            continue  # damaged: newest_checkpoint reports it
        layout = state.get("layout") if isinstance(state, dict) else None
        if layout != LAYOUT:
            _set_aside(path, "earlier")
            warn(f"{path} is of an earlier version with another optimizer layout; renamed, and the stage begins again")


def newest_checkpoint(work: Path, warn: Callable[[str], None] = log.warning) -> tuple[int, Path] | None:
    """The newest intact checkpoint and its phase; damaged ones after it are reported and renamed.

    Raises:
        CorruptError: If there are checkpoints and all are damaged; only the user can decide to begin again.
    """
    found, damaged = checkpoints(work), list[Path]()
    for path in reversed(found):
        try:
            verify_directory(path)
        except CorruptError as error:
            warn(f"step checkpoint passed over: {error}")
            damaged.append(path)
            continue
        # Training comes to their steps again, and a commit leaves what has its name already.
        for one in damaged:
            _set_aside(one, "damaged")
        return int(path.name.split("-")[1]), path
    if found:
        raise CorruptError(f"{work}: none of its {len(found)} step checkpoints verifies; remove it to begin again.")
    return None


def _set_aside(path: Path, why: str) -> None:
    # Not removed: the weights in it may be worth hours of training. One aside of the same step gives way.
    aside = path.with_name(f"{why}-{path.name}")
    if aside.exists():
        remove_directory(aside)
    rename(path, aside)
