"""Stop fine-tuning when held-out answers no longer improve, and keep the best weights.

The held-out pairs choose the step, so their loss at that step is optimistic; measure other pairs if it matters.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from lifelong_moe.config.training import FinetuneConfig
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.tensors import load_weights
from lifelong_moe.storage.verified import verify_directory


class StoppingReport(TypedDict):
    """Result of early stopping."""

    best_step: int
    """Step of the weights that were kept."""
    held_out_nats_per_token: list[tuple[int, float]]
    """Pairs of a step and the loss after it."""


class EarlyStopping(Callback):
    """Measures every so many steps, and stops after ``patience`` measurements without improvement.

    Args:
        config: Interval and patience.
        measure: The held-out loss of a model, in evaluation mode.
        work: The stage's work directory.
    """

    def __init__(self, config: FinetuneConfig, measure: Callable[[LanguageModel], float], work: Path) -> None:
        self.config, self.measure, self.path = config, measure, work / "best"
        self.best, self.best_step, self.waited = float("inf"), -1, 0
        self.curve: list[tuple[int, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the phase had stopped before it was killed."""
        trainer.should_stop = trainer.should_stop or self._is_over

    @property
    def _is_over(self) -> bool:
        return self.config.patience is not None and self.waited >= self.config.patience

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every ``every_steps`` steps and after the last one."""
        step, at_boundary = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = step % self.config.every_steps == 0 or step == trainer.max_steps
        if not (at_boundary and due) or (self.curve and self.curve[-1][0] == step):
            return
        model: LanguageModel = pl_module.model  # type: ignore[assignment]
        loss = self.measure(model)
        self.curve.append((step, loss))
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            # Trainable tensors alone: the others are frozen. They outlive step checkpoints, hence a file of their own;
            # killed before the next checkpoint, the phase measures this step again.
            tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
            shutil.rmtree(self.path, ignore_errors=True)
            write_directory(self.path, {"weights.safetensors": partial(save_file, tensors)})
        else:
            self.waited += 1
        trainer.should_stop = self._is_over

    def state_dict(self) -> dict[str, Any]:
        """Measurements so far."""
        return {"best_step": self.best_step, "waited": self.waited, "curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements."""
        self.best_step, self.waited = int(state_dict["best_step"]), int(state_dict["waited"])
        self.curve = [(int(step), float(loss)) for step, loss in state_dict["curve"]]
        self.best = min((loss for _, loss in self.curve), default=float("inf"))

    def report(self) -> StoppingReport:
        """The curve and its best step."""
        return {"best_step": self.best_step, "held_out_nats_per_token": self.curve}

    @torch.no_grad()
    def restore(self, model: LanguageModel) -> None:
        """Load the best weights into a model."""
        tensors: dict[str, Tensor] = load_weights(verify_directory(self.path), "weights.safetensors")
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def early_stopping(spec: StageSpec, corpora: Mapping[str, TokenizedCorpus], work: Path) -> EarlyStopping | None:
    """The callback for early stopping; None if all steps are taken.

    Args:
        spec: The stage.
        corpora: Text by distribution; the held-out part of what it learns is measured, by shares where it is a mixture.
        work: The stage's work directory.
    """
    config = spec.finetune
    if config is None or config.patience is None:
        return None
    windows = {
        name: evaluation_windows(corpora[name].heldout, spec.model.context, config.held_out_tokens) for name in spec.new
    }

    def measure(model: LanguageModel) -> float:
        losses = [
            evaluate(model, one, distribution=name, batch_tokens=spec.optim.batch_tokens).nats_per_token
            for name, one in windows.items()
        ]
        # Without a mixture the loss itself, to the last bit.
        return sum(loss * share for loss, share in zip(losses, spec.shares, strict=True)) / sum(spec.shares)

    return EarlyStopping(config, measure, work)
