"""The device on which a run's models are evaluated, inspected and sampled from."""

from __future__ import annotations

import logging

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lifelong_moe.config.training import TrainerConfig

log = logging.getLogger(__name__)
CPU = torch.device("cpu")


def configured_device(trainer: TrainerConfig) -> torch.device:
    """The first device of ``trainer``, as Lightning resolves it; the CPU if this machine has none or it is not CUDA."""
    try:
        device = Fabric(accelerator=trainer.accelerator, devices=trainer.devices).device
    except (MisconfigurationException, RuntimeError, TypeError, ValueError, ImportError) as error:
        # No error: the run may have been trained on another machine.
        how, reason = f"{trainer.accelerator}, trainer.devices={trainer.devices}", " ".join(str(error).split())
        log.warning("trainer.accelerator=%s: using the CPU instead: %s", how, reason)
        return CPU
    # Losses are summed in float64, which MPS, for one, lacks.
    return device if device.type == "cuda" else CPU
