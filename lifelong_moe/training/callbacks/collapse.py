"""Warn of router collapse during training: nearly all tokens of a layer choose the same experts.

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
"""A layer has collapsed if it uses at most this share of its experts beyond K."""
MOST_WARNINGS = 4
"""Layers that a phase warns of, each once."""


def effective_experts(counts_E: Tensor) -> float:
    """Exponential of the load's entropy: E if all experts are used evenly, K if K of them take all tokens."""
    # shape: (E,); entr(0) is 0, so unused experts need no case of their own
    share_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return float(torch.exp(torch.special.entr(share_E).sum()))


class CollapseWarning(Callback):
    """Warns of each layer that collapsed between two points of the training curves.

    Args:
        stage: Its name.
        top_k: Experts per token (K).
        every_steps: Between two points of a curve.
    """

    def __init__(self, stage: str, top_k: int, every_steps: int) -> None:
        self.stage, self.top_k, self.every_steps = stage, top_k, every_steps
        self._loads: dict[int, Tensor] = {}
        self._warned: set[int] = set()
        self._since = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, at the step of the checkpoint."""
        self._since = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count loads; every ``every_steps`` check them."""
        # Summed on the device, and read at the points of the curves alone, where the host waits for it anyway.
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
            # Trainable experts that no token chooses are reported as new_expert_share at the end of the stage.
            if not counts_E.any():
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
    """The trainable experts of a layer."""
    # The load of frozen ones is settled: no router loss or learning rate that a user sets could change it.
    numbers = [generation.experts_in(layer) for generation in architecture.generations]
    if architecture.continued is None:
        return slice(sum(numbers[: architecture.frozen]), None)
    first = sum(numbers[: architecture.continued])
    return slice(first, first + numbers[architecture.continued])


def collapse_warning(spec: StageSpec, every_steps: int | None) -> list[CollapseWarning]:
    """The collapse warning, if routers are trained and tokens choose; empty otherwise or without ``every_steps``."""
    # Dense uses all experts by design; in expert choice experts choose, so their loads are equal.
    routing = spec.routing
    if every_steps is None or not routing.has_rows or routing.mode in ("dense", "expert_choice"):
        return []
    return [CollapseWarning(spec.name, routing.top_k, every_steps)]
