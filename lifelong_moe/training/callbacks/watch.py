"""Warn of forgetting while a stage trains: quick looks at a little held-out text of what the model knew before it.

Legend: N excerpts of a distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from safetensors.torch import save_file

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.errors import CorruptError
from lifelong_moe.evaluation.documents import DocumentMeasures, measure_documents
from lifelong_moe.evaluation.predictions import Predictions
from lifelong_moe.evaluation.rise import Rise, paired_rise
from lifelong_moe.measures import MEASURES
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.tensors import load_weights
from lifelong_moe.storage.verified import verify_directory

log = logging.getLogger(__name__)
FILE = "start.safetensors"


@dataclass(frozen=True)
class Watched:
    """What is looked at in a stage, and when."""

    stage: str
    own: tuple[str, ...]
    """The distributions by which the stage is judged; on the first one predictions are compared."""
    texts: Mapping[str, EvaluationSet]
    """Excerpts of held-out text by distribution, the stage's own among them; each excerpt is a document."""
    steps: int
    """Of the whole stage."""
    after: frozenset[int]
    """Steps of the stage after which there is a look."""
    batch_tokens: int
    """Of a forward pass."""

    def losses(self, model: LanguageModel) -> dict[str, DocumentMeasures]:
        """The model's loss on each excerpt, by distribution."""
        return {
            name: measure_documents(model, windows, distribution=name, batch_tokens=self.batch_tokens)
            for name, windows in self.texts.items()
        }


@dataclass(frozen=True)
class Start:
    """What the model made of the excerpts before the stage's first step."""

    nats: Mapping[str, NDArray[np.float64]]
    """Summed cross-entropy of each excerpt ``(N,)``, by distribution."""
    predictions: Predictions
    """On the stage's own text."""

    @classmethod
    def of(cls, watched: Watched, model: LanguageModel) -> Start:
        """Measure it."""
        nats = {name: found.nats for name, found in watched.losses(model).items()}
        own, tokens = watched.own[0], watched.batch_tokens
        return cls(nats, Predictions.of(model, watched.texts[own], distribution=own, batch_tokens=tokens))

    def save(self, path: Path) -> None:
        """Write it to a directory; one that exists stays."""
        said = self.predictions
        tensors = {f"nats/{name}": torch.from_numpy(nats) for name, nats in self.nats.items()}
        tensors |= {"ids": said.ids_TK, "logs": said.logs_TK, "rest": said.rest_T}
        write_directory(path, {FILE: partial(save_file, tensors)})

    @classmethod
    def load(cls, path: Path, watched: Watched, vocabulary: int) -> Start | None:
        """Read it; None if there is none.

        Args:
            path: The directory.
            watched: The same as when it was written.
            vocabulary: Tokens of the model.

        Raises:
            CorruptError: If it is damaged, or of other text.
        """
        if not path.exists():
            return None
        found = load_weights(verify_directory(path), FILE)
        nats = {name: found.pop(f"nats/{name}", torch.empty(0)).numpy() for name in watched.texts}
        tokens = watched.texts[watched.own[0]].num_tokens
        try:
            said = Predictions(found.pop("ids"), found.pop("logs"), found.pop("rest"))
            kept = said.ids_TK.shape[1]
        except (KeyError, IndexError):
            raise CorruptError(f"{path}: not what a stage began with.") from None
        fits = all(len(nats[name]) == windows.num_documents for name, windows in watched.texts.items()) and not found
        shapes = (tuple(said.ids_TK.shape), tuple(said.logs_TK.shape), tuple(said.rest_T.shape))
        ids = said.ids_TK
        is_sound = ids.dtype == torch.int64 and bool(((ids >= 0) & (ids < vocabulary)).all())
        if not fits or shapes != ((tokens, kept), (tokens, kept), (tokens,)) or not is_sound:
            raise CorruptError(f"{path}: of other held-out text than today's.")
        return cls(nats, said)


class ForgettingWatch(Callback):
    """Logs losses and the divergence of each look, and warns of each distribution whose loss has risen.

    It speaks of a distribution when its loss has risen by more than noise explains, and once more when it has risen
    twice as far. It draws no random number and changes no weight. With a sharded model each process has to look, and
    the first of them tells.

    Args:
        watched: What, and when.
        first_step: Steps of the stage before this phase.
        path: Keeps what the stage began with, for a stage that is interrupted.
    """

    def __init__(self, watched: Watched, first_step: int, path: Path) -> None:
        self.watched, self.first_step, self.path = watched, first_step, path
        self._start: Start | None = None
        self._speaks_at: dict[str, float] = {}
        """Rise at which a distribution is spoken of again."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the stage begins with, or read what it began with."""
        model: LanguageModel = pl_module.model  # type: ignore[assignment]
        try:
            self._start = Start.load(self.path, self.watched, model.architecture.num_tokens)
        except CorruptError as error:
            # Training does not depend on it, so it goes on; the line says what will be missing.
            if trainer.is_global_zero:
                log.warning("stage %s: forgetting is not watched: %s", self.watched.stage, error)
            return
        # Here and not on the parent's model: on the same device and in the same precision as every look after it. What
        # the stage has grown changes no prediction yet.
        if self._start is None and self.first_step + trainer.global_step == 0:
            self._start = Start.of(self.watched, model)
            if trainer.is_global_zero:
                self._start.save(self.path)
        if self._start is not None and self.first_step + trainer.global_step == 0:
            self._log(trainer, self._start.nats)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, after the steps that are due."""
        step, watched, start = self.first_step + trainer.global_step, self.watched, self._start
        at_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if start is None or not at_boundary or step not in watched.after:
            return
        model: LanguageModel = pl_module.model  # type: ignore[assignment]
        found, own, tokens = watched.losses(model), watched.own[0], watched.batch_tokens
        kl = start.predictions.divergence(model, watched.texts[own], distribution=own, batch_tokens=tokens)
        self._log(trainer, {name: one.nats for name, one in found.items()}, kl)
        rises = {
            name: paired_rise(start.nats[name], one.nats, one.tokens, watched.texts[name].num_bytes)
            for name, one in found.items()
            if name not in watched.own
        }
        if trainer.is_global_zero:
            self._warn(step, rises, kl)

    def _log(self, trainer: Trainer, nats: Mapping[str, NDArray[np.float64]], kl: float = 0.0) -> None:
        """A point of each curve."""
        points = {
            MEASURES["watched"].of(name): float(nats_N.sum()) / np.log(2) / self.watched.texts[name].num_bytes
            for name, nats_N in nats.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics({**points, MEASURES["kl"].metric: kl}, step=trainer.global_step)

    def _warn(self, step: int, rises: Mapping[str, Rise], kl: float) -> None:
        """Name the distributions that fall, in one line."""
        falling = [
            (name, rise)
            for name, rise in rises.items()
            if rise.is_real and rise.bits_per_byte >= self._speaks_at.get(name, 0.0)
        ]
        for name, rise in falling:
            self._speaks_at[name] = np.inf if name in self._speaks_at else 2 * rise.bits_per_byte
        if falling:
            log.warning(
                "stage %s, %.0f %% in: held-out bits per byte are above the stage's start by %s; KL from the old model "
                "on %s is %.2f nats a token",
                self.watched.stage, 100 * step / self.watched.steps,
                ", ".join(f"{rise.bits_per_byte:.2f} ± {rise.error:.2f} on {name}" for name, rise in falling),
                self.watched.own[0], kl,
            )  # fmt: skip
