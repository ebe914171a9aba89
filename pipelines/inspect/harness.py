"""Stages of a run as models of lm-evaluation-harness: ``--model lifelong-moe --model_args run=my,stage=czech``."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.harness import HarnessModel, Reading, Subject
from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.store.stages import CommittedStage, StageStore
from pipelines.inspect.opening import check_label, load_on_device, open_stage
from pipelines.shared.output import console
from pipelines.shared.places import require_plain_store


class LifelongModel(HarnessModel):
    """A stage of a run below the current directory.

    Args:
        run: Its name.
        stage: A committed stage; the last one if None.
        router: Class of a router of your own, which the stage was trained with.
        batch_size: Requests a forward pass; ``auto`` for as many as 8,192 tokens.
        max_batch_size: Not used: no batch has more than 8,192 tokens by itself.
        device: Where it runs. The harness asks for ``cuda:0`` by itself; without such a device it is the run's.
        reading: Fields of :class:`lifelong_moe.evaluation.harness.Reading`.

    Raises:
        ConfigError: If there is no such stage, or an argument is not known.
    """

    def __init__(
        self,
        run: str,
        stage: str | None = None,
        router: str | None = None,
        batch_size: str | int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **reading: Any,
    ) -> None:
        require_plain_store()
        allow_router(router)
        if unknown := sorted(set(reading) - {one.name for one in fields(Reading)}):
            raise ConfigError(f"--model_args {unknown[0]}: there is no such argument of --model lifelong-moe.")
        # The harness turns names that are numbers into numbers.
        self.run, name = str(run), None if stage is None else str(stage)
        store, self.stage = open_stage(self.run, name)
        check_label(self.stage, reading.get("label"), console(as_json=True))
        rows = None if str(batch_size or "auto").startswith("auto") else int(str(batch_size))
        subject = subject_of(self.run, store, self.stage, label=reading.get("label"))
        if device is not None and (device == "cpu" or torch.cuda.is_available()):
            subject.model.to(device)
        super().__init__(subject, Reading(batch_size=rows, **reading))

    def get_model_info(self) -> dict[str, str]:
        """What was measured, for the harness's own records."""
        return {"run": self.run, "stage": self.stage.name, "stage_key": self.stage.key}


def subject_of(
    run: str, store: StageStore, stage: CommittedStage, *, label: str | None = None, int8: bool = False
) -> Subject:
    """A stage's model on the run's device, the tokenizer of texts of this label, and what ends its texts."""
    ends = Kept(partial(store.kept_text, stage)).ends
    return Subject(load_on_device(run, store, stage, int8=int8), store.tokenizer(stage, label), ends)
