"""Settings of optimizer, Lightning's Trainer, checkpoints, frozen weights and fine-tuning. Torch-free."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.parts import Part
from lifelong_moe.config.routing.bounds import LARGEST, require_bounded
from lifelong_moe.errors import ConfigError


class Schedule(StrEnum):
    """Shape of the learning rate over a stage, after warm-up."""

    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, with a new warm-up in each stage."""

    lr: float = 1e-3
    """Peak learning rate of the first stage; later ones multiply it by ``rewarm``."""
    schedule: Schedule = Schedule.cosine
    """``cosine`` decays to ``min_lr_fraction`` at the stage's end; ``wsd`` (warm-up, stable, decay) keeps the peak and
    decays linearly over the last ``decay_fraction``; ``constant`` never decays, so that later stages can go on
    from it."""
    warmup_fraction: float = 0.05
    """Fraction of each stage's steps over which the learning rate rises linearly."""
    min_lr_fraction: float = 0.1
    """Final learning rate of ``cosine`` and ``wsd``, relative to the peak."""
    decay_fraction: float = 0.2
    """``schedule=wsd``: fraction of the stage's steps over which the learning rate decays."""
    rewarm: float = 1.0
    """Peak learning rate of stages after the first, relative to ``lr``; 1 warms up to the full rate again. Low-rank
    deltas learned better at 2 than at 4."""
    router_until: float = 1.0
    """From the second stage on: fraction of the stage's steps after which router rows no longer change (StableMoE)."""
    batch_tokens: int = 8192
    """Tokens per optimizer step over all devices and micro-batches; a multiple of ``model.context``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""

    def __post_init__(self) -> None:
        require_bounded(self, "optim.")
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
        """A copy with every key that has no effect at its default: equal work, equal keys.

        Args:
            continues: Whether the stage continues another one.
            has_rows: Whether routers have trainable rows.
        """
        used = {
            "rewarm": continues,
            "router_until": continues and has_rows,
            "decay_fraction": self.schedule == Schedule.wsd,
            "min_lr_fraction": self.schedule != Schedule.constant,
        }
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: defaults[key] for key, is_used in used.items() if not is_used})


PRECISIONS = ("32-true", "auto", "bf16-mixed", "bf16-true")
CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# Without Lightning's `xla`, which needs a TPU.
PROFILERS = ("simple", "advanced", "pytorch")


@dataclass(kw_only=True)
class OwnClass:
    """A callback or logger of Lightning's, of another package or of your own, in the words of Lightning's CLI.

    It is code: it is imported where the file that names it is given to ``run``, ``compare`` or ``retrain``, and never
    where a stored configuration names it. Each stage has a new one. Loggers get the points of training curves that
    MLflow gets. Callbacks can change what a stage learns, but not its key: that bits are equal is promised for runs
    without them. What their ``state_dict`` returns, plain data and tensors, is part of a step checkpoint.
    """

    class_path: str
    """Dotted path of the class, such as ``lightning.pytorch.callbacks.LearningRateMonitor``."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for it."""


@dataclass(kw_only=True)
class TrainerConfig:
    """Arguments of ``lightning.Trainer`` under their own names, and the data loader's ``num_workers``."""

    accelerator: str = "auto"
    """``auto``, ``cpu``, ``gpu``, and so on; ``auto`` takes the GPU if there is one."""
    # Any, since an OmegaConf field cannot be a number or a list.
    devices: Any = 1
    """Number of devices, or a list of them. On CPU each is a process with one thread, and their number must divide the
    sequences of a micro-batch. It is part of a stage's key only if each process draws random numbers or assigns all of
    its tokens at once; otherwise results do not depend on it. More than one GPU is not supported yet. The first device
    also evaluates, inspects and writes text, or the CPU on a machine without it."""
    num_nodes: int = 1
    """Number of machines, each with ``devices``. With more than one, torchrun or srun starts ``lifelong-moe run`` once
    on each of them, in a working directory that they share (docs/scheduling.md)."""
    strategy: str = "auto"
    """``auto``, ``ddp``, ``fsdp``, and so on; several processes train with one of these three. With ``ddp``, which
    ``auto`` chooses, each process holds the whole model. With ``fsdp`` each holds a part of its weights, gradients and
    moments, and the whole of a block only while it computes; a teacher is whole in each, and each writes its
    part of a step checkpoint. Stages are those of ``ddp``, and either continues the other's step checkpoints, with any
    number of processes."""
    expert_parallel: int = 1
    """Number of processes among which the experts of each layer are divided: each of them, in order, holds every n-th
    expert of each generation, with its gradient and moments, and text travels to its experts and back. It must divide
    the number of processes, and each generation's experts. Everything else is as ``strategy`` says. Results are those
    of ``ddp`` but for rounding, and stages and step checkpoints its own: any number of processes continues them."""
    precision: str = "32-true"
    """Number format. ``32-true``: float32. ``auto``: what is fastest on the device without rounding what trains: on a
    GPU with bfloat16 trainable parameters, their moments and the residual stream in float32, products in bfloat16,
    frozen matrices held in bfloat16 while the stage trains, and TF32 for the float32 products that are left; float32
    elsewhere, with the bits of ``32-true``. ``bf16-mixed``: products in bfloat16 on any device, all weights in float32.
    ``bf16-true``: everything in bfloat16. The word is part of a stage's key, and the device is not."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off. Part of a stage's key."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step, which together have ``optim.batch_tokens``; part of a stage's key."""
    experts_implementation: ExpertsImplementation = ExpertsImplementation.auto
    """``slices`` multiplies each expert's rows by its own matrices; ``grouped_mm`` does so for all experts in one
    kernel; ``readable`` calls one expert after the other. ``auto`` is ``grouped_mm`` in bfloat16 on GPUs that have it
    (compute capability 9), and ``slices`` elsewhere."""
    cache_teacher: bool = False
    """Keep the teacher's final hidden states of each block on disk while a stage trains, and reuse them when the block
    comes again: worth it where ``replay.buffer_tokens`` makes blocks repeat. A block takes four bytes times
    ``model.context`` times the width of those states. The teacher then computes one block at a time, which changes
    results by rounding."""
    activation_checkpointing: bool = False
    """Recompute attention and experts in the backward pass instead of keeping their activations: less memory for about
    a third more time."""
    compile: bool = False
    """Compile models with ``torch.compile``, from torch 2.13 on; needs a compiler, and takes minutes at first. It
    gained nothing on CPU."""
    num_workers: int = 0
    """Number of processes that load data; 0 loads in the training process. Sample order does not depend on it."""
    log_every_n_steps: int = 10
    """Optimizer steps between two logged points of a training curve."""
    enable_progress_bar: bool = True
    """Show a progress bar if the output is a terminal."""
    deterministic: bool | None = None
    """Reject operations without a deterministic implementation. Null: true on CPU, false elsewhere."""
    benchmark: bool | None = None
    """Let cuDNN choose algorithms by timing them. Null: PyTorch's setting, false unless changed."""
    detect_anomaly: bool = False
    """Trace the operation that produced a NaN; slow."""
    profiler: str | None = None
    """Lightning's profiler: ``simple``, ``advanced`` or ``pytorch``. Null: none."""
    callbacks: list[OwnClass] = field(default_factory=list)
    """Further callbacks."""
    logger: list[OwnClass] = field(default_factory=list)
    """Further loggers."""

    def __post_init__(self) -> None:
        require_bounded(self, "trainer.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision} is unknown; there are {', '.join(PRECISIONS)}.")
        if self.profiler is not None and self.profiler not in PROFILERS:
            raise ConfigError(f"trainer.profiler={self.profiler} is unknown; there are {', '.join(PROFILERS)}.")
        for key in ("callbacks", "logger"):
            for i, one in enumerate(getattr(self, key)):
                if not CLASS_PATH.fullmatch(one.class_path):
                    raise ConfigError(
                        f"trainer.{key}[{i}].class_path={one.class_path} must be a dotted path, such as "
                        f"package.module.Class."
                    )
        if not isinstance(self.devices, (int, str, list)):
            raise ConfigError(f"trainer.devices={self.devices} must be a number, a list or a string.")
        # Also of a number that is written as a string, or of a list.
        is_long = isinstance(self.devices, str) and len(self.devices) > 20
        if is_long or self.processes > LARGEST["devices"]:
            raise ConfigError(f"trainer.devices={self.devices} must be at most {LARGEST['devices']:,} devices.")
        # Lightning would start processes of its own; ours begin once the main process has prepared model and text.
        if any(word in self.strategy for word in ("spawn", "fork", "notebook")):
            raise ConfigError(f"trainer.strategy={self.strategy} is not supported; set trainer.strategy=ddp.")
        if self.processes > 1 and (self.accelerator not in ("auto", "cpu") or isinstance(self.devices, list)):
            raise ConfigError(
                f"trainer.devices={self.devices} with trainer.accelerator={self.accelerator}: several processes train "
                f"on CPU only so far. Set trainer.devices=1, or trainer.accelerator=cpu and a number of devices."
            )
        if self.processes > 1 and self.strategy not in ("auto", "ddp", "fsdp"):
            raise ConfigError(
                f"trainer.strategy={self.strategy} with trainer.devices={self.devices}: several processes train with "
                f"ddp or fsdp only. Set trainer.strategy=ddp."
            )
        if self.is_sharded and (self.precision not in ("32-true", "auto") or self.compile):
            key = "compile=true" if self.compile else f"precision={self.precision}"
            raise ConfigError(f"trainer.strategy=fsdp does not support trainer.{key}. Set trainer.strategy=ddp.")
        for key in ("num_nodes", "expert_parallel", "accumulate_grad_batches", "log_every_n_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"trainer.{key}={getattr(self, key)} must be at least 1.")
        self._check_expert_parallel()
        for key in ("gradient_clip", "num_workers"):
            if getattr(self, key) < 0:
                raise ConfigError(f"trainer.{key}={getattr(self, key)} must not be negative.")

    def _check_expert_parallel(self) -> None:
        """Require processes among which experts can be divided, and what these support."""
        key = f"trainer.expert_parallel={self.expert_parallel}"
        if self.processes % self.expert_parallel:
            raise ConfigError(f"{key} must divide the {self.processes} processes of trainer.devices and num_nodes.")
        if self.expert_parallel == 1:
            return
        if self.compile:
            raise ConfigError(f"{key} does not support trainer.compile=true. Set it to false.")

    def require_one_machine(self) -> None:
        """Require that training takes one machine, in a command that takes no more.

        Raises:
            ConfigError: If it takes several.
        """
        if self.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={self.num_nodes}: only `lifelong-moe run`, started on each machine by torchrun or "
                f"srun, trains on several (docs/scheduling.md). Set trainer.num_nodes=1."
            )

    @property
    def is_divided(self) -> bool:
        """Whether no process can compute alone while a stage trains, since each holds a part of the model."""
        return self.is_sharded or self.expert_parallel > 1

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the model while a stage trains."""
        return self.strategy == "fsdp" and self.processes > 1

    @property
    def processes(self) -> int:
        """Processes that take every step together, on all machines."""
        return self.processes_here * self.num_nodes

    @property
    def processes_here(self) -> int:
        """Those on each machine."""
        if isinstance(self.devices, list):
            return len(self.devices)
        # Lightning decides what "auto" and -1 mean; `build_trainer` compares its number of processes with this one.
        text = str(self.devices)
        return max(1, int(text)) if text.isdecimal() else 1


@dataclass(kw_only=True)
class CheckpointConfig:
    """Step checkpoints within a stage; never part of its key."""

    every_steps: int = 50
    """Optimizer steps between two checkpoints. If losses stay non-finite, a stage goes back to the newest checkpoint
    before them, or begins again if there is none."""
    # Two, since a damaged newest checkpoint is passed over for the one before it.
    keep: int = 2
    """Number of newest checkpoints to keep; older ones are removed."""

    def __post_init__(self) -> None:
        require_bounded(self, "checkpoint.")
        for key in ("every_steps", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"checkpoint.{key}={getattr(self, key)} must be at least 1.")


class Offload(StrEnum):
    """Memory that holds frozen experts' weights while a stage trains on an accelerator."""

    none = "none"
    cpu = "cpu"


@dataclass(kw_only=True)
class FrozenConfig:
    """Placement of frozen weights while a stage trains; never part of its key."""

    offload: Offload = Offload.none
    """``none``: frozen experts stay on the GPU. ``cpu``: they stay in page-locked CPU memory, the teacher's as well,
    and are copied to the GPU layer by layer when needed. Results are the same, but all frozen experts cross the bus
    twice per micro-batch, the teacher's once. No effect without CUDA."""


class Trainable(StrEnum):
    """Parameters that fine-tuning trains."""

    all = "all"
    non_moe = "non_moe"
    moe = "moe"
    attention = "attention"


@dataclass(kw_only=True)
class FinetuneConfig:
    """How a stage of ``kind: finetune`` trains, on prompts with answers."""

    trainable: Trainable = Trainable.all
    """Trainable parameters: ``all``; ``non_moe``, all but routed experts and routers, including dense layers and shared
    experts; ``moe``, only routed experts and routers; or only ``attention``. The others do not change by a bit."""
    expert_dropout: float = 0.0
    """Fraction of the hidden units within each expert that are dropped in training (ST-MoE: 0.4); 0 drops none."""
    patience: int | None = None
    """Stop after this many measurements in a row without a better held-out loss, and keep the best weights. Null: take
    all steps, and keep the last weights."""
    every_steps: int = 20
    """``patience``: optimizer steps between two measurements."""
    held_out_tokens: int = 10_000
    """``patience``: tokens of held-out answers that a measurement scores."""

    def __post_init__(self) -> None:
        require_bounded(self, "finetune.")
        if not 0.0 <= self.expert_dropout < 1.0:
            raise ConfigError(f"finetune.expert_dropout={self.expert_dropout} must lie in [0, 1).")
        for key in ("every_steps", "held_out_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"finetune.{key}={getattr(self, key)} must be at least 1.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"finetune.patience={self.patience} must be at least 1.")

    def trains(self, part: Part) -> bool:
        """Whether fine-tuning trains a part of the model.

        A sparse layer consists of routed experts and a router. Dense layers' feed-forward networks do not belong to it,
        nor do shared experts and their mix: every token uses these, as it uses attention.

        Source:
            ST-MoE (arXiv:2202.08906), section 4.2, where the feed-forward networks of the layers between sparse ones
            are among the non-MoE parameters. It has no shared experts; counting them among those is our choice.
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
        """A copy with every key that has no effect at its default: without ``patience`` nothing is measured."""
        if self.patience is not None:
            return self
        return FinetuneConfig(trainable=self.trainable, expert_dropout=self.expert_dropout)
