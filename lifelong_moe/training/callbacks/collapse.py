"""Router collapse, said while it happens: a layer whose tokens nearly all choose the same experts.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.spec import StageSpec

log = logging.getLogger(__name__)

NEARLY = 0.1
"""Of the experts beyond K that a layer could use, it uses at most this share: then it has collapsed."""
MOST_WARNINGS = 4
"""A phase warns of so many layers, each once; further ones are not named."""


def effective_experts(counts_E: Tensor) -> float:
    """How many experts evenly used would have the same entropy of load: E if all are, K if K take all tokens."""
    share_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return float(torch.exp(torch.special.entr(share_E).sum()))


class CollapseWarning(Callback):
    """Warns of each layer that collapsed between two points of the training curves.

    Loads are summed on the device, and read at those points alone, where the curves are read too.

    Args:
        stage: Its name.
        top_k: Experts of a token (K).
        every_steps: Between two points of a curve.
    """

    def __init__(self, stage: str, top_k: int, every_steps: int) -> None:
        self.stage, self.top_k, self.every_steps = stage, top_k, every_steps
        self._loads: dict[int, Tensor] = {}
        self._warned: set[int] = set()
        self._since = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, after what was done before an interruption."""
        self._since = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; every ``every_steps`` look at what was counted."""
        for layer, counts_E in enumerate(outputs["loads"]):
            self._loads[layer] = counts_E + self._loads[layer] if layer in self._loads else counts_E
        step = trainer.global_step
        if len(self._warned) == MOST_WARNINGS or step - self._since < self.every_steps:
            return
        model: Any = pl_module.model
        architecture: Architecture = model.architecture
        for layer, of_all_E in self._loads.items():
            counts_E = of_all_E[_training(architecture, layer)]
            competing = len(counts_E)
            if layer in self._warned or len(self._warned) == MOST_WARNINGS or competing <= self.top_k:
                continue
            if not counts_E.any():  # what is never chosen is warned of when the stage ends
                continue
            used = effective_experts(counts_E)
            if used < self.top_k + NEARLY * (competing - self.top_k):
                self._warned.add(layer)
                share = float(counts_E.max() / counts_E.sum())
                log.warning(
                    "stage %s: the router of layer %d has collapsed in steps %d to %d: one expert takes %.0f %% of the "
                    "assignments, and %.1f of %d experts are in use. A larger routing.balance_loss or a smaller "
                    "optim.lr may help.",
                    self.stage, layer, self._since + 1, step, 100 * share, used, competing,
                )  # fmt: skip
        self._loads, self._since = {}, step


def _training(architecture: Architecture, layer: int) -> slice:
    """The experts that train: others are used or not as they were, whatever a router's loss or rate are set to."""
    numbers = [generation.experts_in(layer) for generation in architecture.generations]
    if architecture.continued is None:
        return slice(sum(numbers[: architecture.frozen]), None)
    first = sum(numbers[: architecture.continued])
    return slice(first, first + numbers[architecture.continued])


def collapse_warning(spec: StageSpec, every_steps: int | None) -> list[CollapseWarning]:
    """What warns of collapse in one process, where routers are trained and tokens choose."""
    routing = spec.routing
    if every_steps is None or not routing.has_rows or routing.mode in ("dense", "expert_choice"):
        return []
    return [CollapseWarning(spec.name, routing.top_k, every_steps)]
