"""How a stage is optimized and what Lightning is told. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.parts import Part
from lifelong_moe.errors import ConfigError


class Schedule(StrEnum):
    """Shape of the learning rate over a stage, after warm-up."""

    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, warmed up anew in each stage."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = Schedule.cosine
    """``cosine`` decays to ``min_lr_fraction`` at the stage's end; ``wsd`` (warm-up, stable, decay) keeps the peak and
    decays linearly in the last ``decay_fraction``; ``constant`` never decays, so that a stream can go on from it."""
    warmup_fraction: float = 0.05
    """Share of the stage's steps over which the rate rises linearly; it starts anew in each stage."""
    min_lr_fraction: float = 0.1
    """Final rate of ``cosine`` and ``wsd``, relative to the peak."""
    decay_fraction: float = 0.2
    """``wsd``: share of the stage's steps that decay."""
    rewarm: float = 1.0
    """Peak rate of stages after the first, relative to ``lr``; 1 warms up to the full rate again. Low-rank deltas
    learned better at twice the rate than at four times."""
    router_until: float = 1.0
    """From the second stage on: share of the stage's steps after which router rows stay as they are (StableMoE)."""
    batch_tokens: int = 8192
    """Tokens an optimizer step over all devices and accumulation steps; a multiple of ``model.context``."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""

    def __post_init__(self) -> None:
        for key in ("lr", "rewarm"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must be positive.")
        for key in ("warmup_fraction", "min_lr_fraction", "decay_fraction", "router_until"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must lie in [0, 1].")
        for key in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must lie in [0, 1).")
        if self.batch_tokens < 1:
            raise ConfigError(f"optim.batch_tokens={self.batch_tokens} must be positive.")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must not be negative.")

    def effective(self, *, continues: bool, has_rows: bool) -> OptimConfig:
        """The same, with every key that changes nothing at its default: equal work, equal keys.

        Args:
            continues: Whether the stage has one before it.
            has_rows: Whether routers have rows that train.
        """
        used = {
            "rewarm": continues,
            "router_until": continues and has_rows,
            "decay_fraction": self.schedule == Schedule.wsd,
            "min_lr_fraction": self.schedule != Schedule.constant,
        }
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: defaults[key] for key, is_used in used.items() if not is_used})


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
PROFILERS = ("simple", "advanced", "pytorch")


@dataclass(kw_only=True)
class TrainerConfig:
    """Arguments of ``lightning.Trainer`` under their own names, and the data loader's ``num_workers``."""

    accelerator: str = "auto"
    """``auto``, ``cpu``, ``gpu``, ..."""
    devices: Any = 1
    """How many devices, or which. On CPU each is a process with one thread, and their number must divide the sequences
    of a micro-batch; it is part of a stage's key only where each draws random numbers or assigns its tokens all at
    once, since nothing else depends on it. There can be one GPU so far. The first of them evaluates, inspects and
    writes text as well, or the CPU on a machine without it."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """``auto``, ``ddp``, ...; several processes train with ``ddp``, which ``auto`` then means too."""
    precision: str = "32-true"
    """``32-true``, ``bf16-mixed`` or ``bf16-true``; part of a stage's key."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0 does not clip; part of a stage's key."""
    accumulate_grad_batches: int = 1
    """Micro-batches a step; the global batch stays ``optim.batch_tokens``; part of a stage's key."""
    experts_implementation: ExpertsImplementation = ExpertsImplementation.auto
    """``slices`` multiplies each expert's rows by its own matrices, ``grouped_mm`` all in one kernel, ``readable``
    calls one expert after the other; ``auto`` is ``grouped_mm`` in bfloat16 on GPUs that have it (compute capability
    9), and ``slices`` elsewhere."""
    cache_teacher: bool = False
    """Keep on disk, while a stage trains, what its teacher makes of each block, for the next time the block comes:
    worth it where ``replay.buffer_tokens`` lets blocks come again. A block takes four bytes times ``model.context``
    times the width of the teacher's final hidden states. The teacher is then asked about one block at a time, which
    changes results by rounding."""
    activation_checkpointing: bool = False
    """Compute attention and experts again in the backward pass instead of keeping what is in between: less memory for
    about a third more time."""
    compile: bool = False
    """Compile models with ``torch.compile``; needs a compiler, and minutes to begin with. On CPU it gained nothing."""
    num_workers: int = 0
    """Processes that load data; sample order does not depend on it."""
    log_every_n_steps: int = 10
    """Steps between two logged points of a training curve."""
    enable_progress_bar: bool = True
    """Show a progress bar where the output is a terminal."""
    deterministic: bool | None = None
    """Refuse operations without a deterministic implementation; by default on for CPU."""
    benchmark: bool | None = None
    """Let cuDNN choose algorithms by timing."""
    detect_anomaly: bool = False
    """Trace the operation that made a NaN; slow."""
    profiler: str | None = None
    """``simple``, ``advanced`` or ``pytorch``."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision} is unknown; there are {', '.join(PRECISIONS)}.")
        if self.profiler is not None and self.profiler not in PROFILERS:
            raise ConfigError(f"trainer.profiler={self.profiler} is unknown; there are {', '.join(PROFILERS)}.")
        if not isinstance(self.devices, (int, str, list)):
            raise ConfigError(f"trainer.devices={self.devices} must be a number, a list or a string.")
        if self.num_nodes > 1:
            raise ConfigError(f"trainer.num_nodes={self.num_nodes}: a run is on one machine so far. Set it to 1.")
        if any(word in self.strategy for word in ("spawn", "fork", "notebook")):
            raise ConfigError(f"trainer.strategy={self.strategy} is not supported; set trainer.strategy=ddp.")
        if self.processes > 1 and (self.accelerator not in ("auto", "cpu") or isinstance(self.devices, list)):
            raise ConfigError(
                f"trainer.devices={self.devices} with trainer.accelerator={self.accelerator}: several processes train "
                f"on CPU only so far. Set trainer.devices=1, or trainer.accelerator=cpu and a number of devices."
            )
        if self.processes > 1 and self.strategy not in ("auto", "ddp"):
            raise ConfigError(
                f"trainer.strategy={self.strategy} with trainer.devices={self.devices}: several processes train with "
                f"ddp only. Set trainer.strategy=ddp."
            )
        for key in ("num_nodes", "accumulate_grad_batches", "log_every_n_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"trainer.{key}={getattr(self, key)} must be at least 1.")
        for key in ("gradient_clip", "num_workers"):
            if getattr(self, key) < 0:
                raise ConfigError(f"trainer.{key}={getattr(self, key)} must not be negative.")

    @property
    def processes(self) -> int:
        """Processes that take every step together."""
        if isinstance(self.devices, list):
            return len(self.devices)
        text = str(self.devices)
        return max(1, int(text)) if text.isdecimal() else 1


@dataclass(kw_only=True)
class CheckpointConfig:
    """Step checkpoints within a stage; never part of its key."""

    every_steps: int = 50
    """Steps between two checkpoints. Where losses stay non-finite a stage goes back to the newest one before them; with
    none it begins again."""
    keep: int = 2
    """Newest checkpoints kept; older ones are removed."""

    def __post_init__(self) -> None:
        for key in ("every_steps", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"checkpoint.{key}={getattr(self, key)} must be at least 1.")


class Offload(StrEnum):
    """Where frozen experts' weights are while a stage trains on an accelerator."""

    none = "none"
    cpu = "cpu"


@dataclass(kw_only=True)
class FrozenConfig:
    """What is done with frozen weights while a stage trains; never part of its key."""

    offload: Offload = Offload.none
    """``cpu``: frozen experts, the teacher's too, stay in page-locked CPU memory, and a layer's weights come to the GPU
    when it needs them: the same results, but all frozen experts cross the bus twice a micro-batch, a teacher's once.
    Without CUDA it changes nothing."""


class Trainable(StrEnum):
    """What fine-tuning trains."""

    all = "all"
    non_moe = "non_moe"
    moe = "moe"
    attention = "attention"


@dataclass(kw_only=True)
class FinetuneConfig:
    """How a stage of ``kind: finetune`` trains, on prompts with answers."""

    trainable: Trainable = Trainable.all
    """``all``; ``non_moe``: everything but routed experts and routers, so dense layers and shared experts too; ``moe``:
    routed experts and routers alone; or ``attention`` alone. The rest stays the same bits."""
    expert_dropout: float = 0.0
    """Share of the hidden units within each expert that are dropped in training (ST-MoE: 0.4)."""
    patience: int | None = None
    """Stop when the held-out loss has not improved in so many measurements, and keep the best weights; by default all
    steps are taken, and the last weights kept."""
    every_steps: int = 20
    """Steps between two measurements."""
    held_out_tokens: int = 10_000
    """Answers' tokens that a measurement scores."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.expert_dropout < 1.0:
            raise ConfigError(f"finetune.expert_dropout={self.expert_dropout} must lie in [0, 1).")
        for key in ("every_steps", "held_out_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"finetune.{key}={getattr(self, key)} must be at least 1.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"finetune.patience={self.patience} must be at least 1.")

    def trains(self, part: Part) -> bool:
        """Whether fine-tuning trains a part of the model.

        A sparse layer is its routed experts and its router. Dense layers' feed-forward networks are no part of it, nor
        are shared experts and their mix: every token uses these, as it uses attention.

        Source:
            ST-MoE (arXiv:2202.08906), section 4.2, where the feed-forward networks of the layers between sparse ones
            are among the non-MoE parameters. It has no shared experts; that they go with those is ours.
        """
        match self.trainable:
            case Trainable.non_moe:
                return not part.is_routed
            case Trainable.moe:
                return part.is_routed
            case Trainable.attention:
                return part == Part.attention
            case _:
                return True

    def effective(self) -> FinetuneConfig:
        """The same, with every key that changes nothing at its default: without ``patience`` nothing is measured."""
        if self.patience is not None:
            return self
        return FinetuneConfig(trainable=self.trainable, expert_dropout=self.expert_dropout)
