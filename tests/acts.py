"""A callback that a configuration names, for tests of ranks that a command starts and no test can patch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Act(Callback):
    """Does something before a step of a rank.

    Args:
        what: ``kill`` ends the rank, ``ask`` asks the main process to stop, ``end`` kills it and waits for ever, and
            ``note`` writes what the rank has imported, its threads and its process to a file.
        rank: Of all.
        step: Of the phase.
    """

    def __init__(self, what: str, rank: int = 1, step: int = 5) -> None:
        self.what, self.rank, self.step = what, rank, step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Act, when the step is there."""
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        match self.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "ask":
                os.kill(os.getppid(), signal.SIGTERM)
                while signal.SIGTERM not in signal.sigpending():
                    time.sleep(0.01)
            case "end":
                self._note()
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
            case "note":
                self._note()

    def _note(self) -> None:
        import torch

        found = {"modules": sorted(sys.modules), "threads": torch.get_num_threads(), "pid": os.getpid()}
        Path(f"noted-{self.rank}.json").write_text(json.dumps(found))
