"""The devices of a run: whether this machine has those that train, and the one that reads and writes text.

Without Lightning, which takes longer to import than torch: it is asked only about a trainer that few machines can have.
"""

from __future__ import annotations

import logging
from itertools import chain

import torch
from torch.torch_version import TorchVersion

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.callbacks.late import importing_lightning

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
COMPILES = "2.13"
"""The oldest torch whose compiled gradients were found to be those of the model as it is written."""
HEADROOM = 1.25
"""Memory that a model is read in, over that of its tensors: activations, logits of a chunk, keys and values."""


def require_trainer(config: TrainerConfig) -> None:
    """Require that this machine can do what ``trainer`` asks for, before anything is written.

    Raises:
        ConfigError: If it cannot.
    """
    if config.compile and TorchVersion(torch.__version__) < COMPILES:
        raise ConfigError(
            f"trainer.compile=true: torch {torch.__version__} is older than {COMPILES}, the oldest that this was "
            f"tested with; compiled by 2.11, experts get wrong gradients. Set it to false, or install a newer torch."
        )
    if config.num_nodes > 1:
        with importing_lightning():
            from lifelong_moe.training.ranks.nodes import joined

        joined(config)
    every_machine_has_it = config.processes == config.devices == 1 and config.accelerator in ("auto", "cpu")
    is_plain = config.strategy in ("auto", "ddp") and not config.benchmark and not config.detect_anomaly
    names_classes = bool(config.callbacks or config.logger)
    is_default = config.deterministic is None and config.profiler is None and not names_classes
    if not (every_machine_has_it and is_plain and is_default):
        with importing_lightning():
            from lifelong_moe.training.loop.trainer import build_trainer, own_callbacks, own_loggers

        # Classes of the user's own are built once only to see that they can be.
        build_trainer(config, 1, own_callbacks(config), own_loggers(config))
        return
    # As Lightning's Trainer does, but `use_deterministic_algorithms` would import the compiler, which takes a second.
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    torch.set_deterministic_debug_mode("error" if on_cpu else "default")


def configured_device(trainer: TrainerConfig) -> torch.device:
    """The first device of ``trainer``, as Lightning counts them; the CPU if this machine has none or it is not CUDA."""
    index, there = _first_index(trainer.devices), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if trainer.accelerator in ("auto", "gpu", "cuda") and index is not None and 0 <= index < there:
        return torch.device("cuda", index)
    # No error: the run may have been trained on another machine. On MPS neither, which lacks the losses' float64.
    if trainer.accelerator not in ("auto", "cpu") or index != 0:
        how = f"{trainer.accelerator}, trainer.devices={trainer.devices}"
        log.warning("trainer.accelerator=%s: using the CPU instead: this machine has %d CUDA devices", how, there)
    return CPU


def rounds_products(trainer: TrainerConfig) -> bool:
    """Whether ``trainer.precision=auto`` is set, and the first device multiplies in bfloat16: a GPU from Ampere on."""
    if trainer.precision != "auto":
        return False
    device = configured_device(trainer)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def on_configured_device(model: LanguageModel, trainer: TrainerConfig) -> LanguageModel:
    """A model on the device of :func:`configured_device`; on the CPU, with a warning, if that has too little memory."""
    device = configured_device(trainer)
    if device.type == "cuda":
        # Training may need less: there weights may be in bfloat16, and frozen ones in 8 bits.
        needed = HEADROOM * sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            size = needed / HEADROOM / 1e9
            log.warning("a model of %.1f GB is read on the CPU: %s has %.1f GB free", size, device, free / 1e9)
            device = CPU
    # There already, as always without a GPU: a move to the same place would walk through every generation.
    is_there = device == CPU == model.embedding.weight.device
    return model if is_there else model.to(device)


def _first_index(devices: int | str | list[int]) -> int | None:
    """Index of the first device: a list names devices, also as "1,2"; a number and "auto" count them."""
    named = devices if isinstance(devices, list) else str(devices).split(",") if "," in str(devices) else [0]
    try:
        return int(named[0])
    except (ValueError, TypeError, IndexError):
        return None
