"""The device that a run's models are read on: evaluated, inspected, sampled from."""

from __future__ import annotations

import logging

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lifelong_moe.config.training import TrainerConfig

log = logging.getLogger(__name__)
CPU = torch.device("cpu")


def configured_device(trainer: TrainerConfig) -> torch.device:
    """The first of the devices that ``trainer`` names, as Lightning resolves them.

    It is the CPU where this machine has no such device, since a run may have been trained on another one; and in place
    of an accelerator other than CUDA, because losses are summed in float64.
    """
    try:
        device = Fabric(accelerator=trainer.accelerator, devices=trainer.devices).device
    except (MisconfigurationException, RuntimeError, TypeError, ValueError, ImportError) as error:
        how, reason = f"{trainer.accelerator}, trainer.devices={trainer.devices}", " ".join(str(error).split())
        log.warning("trainer.accelerator=%s: on the CPU instead: %s", how, reason)
        return CPU
    return device if device.type == "cuda" else CPU
