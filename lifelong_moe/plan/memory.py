"""Memory that training holds at once, estimated before any is taken. Torch-free.

An estimate from below: only tensors that must be there together are counted, so what is refused could not have run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.parts import Part
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import parameters_by_part
from lifelong_moe.plan.disk import BYTES, TOKEN_BYTES
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import planned_base, trainable_parameters
from lifelong_moe.plan.spec import BASE, StageSpec

CHUNK_TOKENS, CHUNK_LOGITS = 1024, 1 << 24
"""Bounds of the logits that are there at once; those of :mod:`lifelong_moe.ops.losses`, which needs torch."""
LIBRARIES_BYTES = 650_000_000
"""What Python, torch, Lightning and MLflow take of a process before its first tensor. Measured on Linux, no bound."""
LOADER_BYTES = 10_000_000
"""Of a process that loads data, beyond what it shares with the one that started it."""
# Smaller tokenizers than this one do not exist: 256 bytes and the document separator.
LEAST_VOCABULARY = 257
_SOURCES = {
    Part.expert: "model.experts, model.expert_width or grow.experts",
    Part.router: "model.experts or grow.experts",
    Part.embedding: "tokenizer.vocab_size or model.width",
    Part.head: "tokenizer.vocab_size or model.width",
    Part.shared: "model.shared_experts or model.expert_width",
    Part.dense: "model.dense_width or model.expert_width",
}
"""Keys that decide how many parameters a part has; the width and the number of layers do so everywhere."""
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class MemoryNeed:
    """Lower bound of the bytes that a stage's training holds at once, over all of its processes."""

    weights: int
    """Of all parameters, frozen ones included."""
    training: int
    """Gradients and AdamW's two moments of the trainable parameters."""
    activations: int
    """What a micro-batch leaves for the backward pass."""
    logits: int
    """Of a chunk of tokens, in float32, and their gradient."""
    text: int
    """Text that the model writes."""
    loaders: int
    """Of processes that load data."""
    most: str
    """Keys that most of its parameters come from."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations + self.logits + self.text + self.loaders

    @property
    def remedy(self) -> str:
        """Keys to set lower, or higher, for the stage to need less."""
        keys = {
            self.weights + self.training: f"{self.most} lower",
            self.activations: "optim.batch_tokens lower, or trainer.accumulate_grad_batches higher",
            self.logits: "tokenizer.vocab_size lower",
            self.text: "replay.fraction or penalty.fisher_tokens lower",
            self.loaders: "trainer.num_workers lower",
        }
        return keys[max(keys)]


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are there at once; as :func:`lifelong_moe.ops.losses.chunk_tokens`."""
    return max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary))


def memory_need(spec: StageSpec, architecture: Architecture, trainer: TrainerConfig) -> MemoryNeed:
    """Estimate what training a stage holds at once, on the device that trains.

    Args:
        spec: The stage.
        architecture: At its end.
        trainer: How many processes train and load data, what each holds, and whether activations are recomputed.

    Raises:
        ConfigError: If processes cannot share its experts evenly.
    """
    if trainer.expert_parallel > 1:
        _require_divisible(architecture, trainer.expert_parallel)
    size, counts = BYTES[spec.precision], parameters_by_part(architecture)
    trainable = trainable_parameters(spec, architecture)
    sources: Counter[str] = Counter()
    for (part, generation), number in counts.items():
        # Of attention, embedding and head a generation owns its low-rank changes, and rows of its own tokens.
        is_delta = generation is not None and not part.is_routed
        source = "trunk.rank" if spec.delta_rank else "vocabulary.add"
        sources[source if is_delta else _SOURCES.get(part, "model.width or model.layers")] += number
    # A process has a gradient and moments of its own, unless it has a part of them; frozen weights are counted once.
    trained_experts = sum(
        number
        for (part, generation), number in counts.items()
        if part == Part.expert and spec.trains_part(architecture, part, generation)
    )
    copies = 1 if trainer.is_sharded else trainer.processes
    apart = trainer.processes // trainer.expert_parallel if trainer.expert_parallel > 1 else copies
    own = size * (copies * (trainable - trained_experts) + apart * trained_experts)
    kind = FrozenWeights.full if spec.grow is None else spec.grow.frozen_weights
    frozen = {FrozenWeights.full: size, FrozenWeights.half: 2, FrozenWeights.int8: 1}[kind]
    tokens = spec.optim.batch_tokens // spec.accumulate
    # What `auto` becomes is the device's: at most what it takes in float32.
    kept = 4 if spec.precision in ("32-true", "auto") else 2
    return MemoryNeed(
        weights=frozen * (sum(counts.values()) - trainable) + own,
        training=3 * own,
        activations=kept * tokens * _kept_numbers(spec, architecture, trainer),
        logits=2 * 4 * min(chunk_tokens(architecture.num_tokens), tokens) * architecture.num_tokens,
        text=TOKEN_BYTES * architecture.model.context * sum(spec.written_blocks),
        loaders=LOADER_BYTES * trainer.num_workers * trainer.processes,
        most=max(sources, key=lambda keys: sources[keys]),
    )


def _require_divisible(architecture: Architecture, ranks: int) -> None:
    """Refuse experts that processes cannot share evenly, or one by one."""
    key = f"trainer.expert_parallel={ranks}"
    for generation in architecture.generations:
        for experts in sorted(set(generation.experts_by_layer(architecture.model.layers))):
            if experts % ranks:
                raise ConfigError(
                    f"{key} must divide the experts that each stage adds to a layer, and stage {generation.stage} has "
                    f"{experts}."
                )
        if generation.rank:
            # What an expert changes may be elsewhere.
            raise ConfigError(f"{key} does not support low-rank experts, which stage {generation.stage} has.")


def _kept_numbers(spec: StageSpec, architecture: Architecture, trainer: TrainerConfig) -> int:
    """Numbers that a token's forward pass leaves for the backward pass, at least."""
    # A trunk that is frozen as a whole below the lowest layer that grows leaves nothing there.
    grow, frozen_trunk = spec.grow, spec.trunk is not None and spec.trunk.is_frozen and not spec.delta_rank
    first = min(grow.layers) if grow is not None and grow.layers and grow.freezes and frozen_trunk else 0
    config = architecture.model
    # Recomputed otherwise: only what goes into a block is kept.
    block = config.width
    if not trainer.activation_checkpointing:
        # Inputs of both sublayers and their norms; queries, keys, values and their sum; what a network keeps.
        attention = config.attention_width * (2 * config.heads + 2 * config.kv_heads)
        block = 4 * config.width + attention + _networks(spec, architecture) * _kept_by_a_network(spec, config)
    return (config.layers - first) * block


def _networks(spec: StageSpec, architecture: Architecture) -> int:
    """Feed-forward networks that read a token in a layer, at least."""
    # Others than learned routers may leave a token to fewer, and a generation may have fewer.
    num = spec.routing.top_k if isinstance(spec.routing, LearnedConfig) and not spec.routing.capacity else 1
    return min(num, max(1, architecture.generations[-1].experts))


def _kept_by_a_network(spec: StageSpec, config: ModelConfig) -> int:
    """Its input and output; before its activation, of which a gated one has two halves, and after."""
    hidden = 3 if config.activation.is_gated else 2
    # Low-rank experts make the latter again.
    hidden -= spec.grow is not None and spec.grow.rank > 0
    return 2 * config.width + hidden * min(config.expert_width, config.dense_width or config.expert_width)


def memory_needs(config: RunConfig) -> Iterator[tuple[str, MemoryNeed]]:
    """What each stage of a run would hold, with its name, before any text is read.

    Without text the vocabulary is as configured, or, with a tokenizer's file, the smallest possible.
    """
    vocabulary = config.tokenizer.vocab_size if config.tokenizer.file is None else LEAST_VOCABULARY
    base = planned_base(config, 0)
    architectures = {} if base is None else {BASE: base.architecture}
    for i, spec in enumerate(stage_specs(config)):
        parent = None if spec.parent is None else architectures[spec.parent]
        added = 0 if spec.vocabulary is None else spec.vocabulary.add
        architectures[i] = spec.architecture(parent, vocabulary, 0, added)
        yield spec.name, memory_need(spec, architectures[i], config.trainer)


def require_memory(config: RunConfig) -> None:
    """Refuse a run that this machine's memory cannot hold.

    On a GPU only weights are compared, which pass through main memory; there, what does not fit is found out later.

    Raises:
        ConfigError: Naming the first such stage, what it needs, and the keys to set lower.
    """
    there = machine_bytes()
    for name, need in memory_needs(config):
        bytes_needed = need.weights if _trains_elsewhere(config.trainer) else need.total
        if bytes_needed > there:
            raise ConfigError(
                f"stage {name} needs at least {_gigabytes(bytes_needed)} of memory, and this machine has "
                f"{_gigabytes(there)}. Set {need.remedy}."
            )


def machine_bytes() -> int:
    """Main memory of this machine, or of the container that limits it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUPS:
        # Without a limit it says "max", or a number beyond any machine.
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            found.append(int(text))
    return min(found)


def _trains_elsewhere(trainer: TrainerConfig) -> bool:
    """Whether training runs on an accelerator with memory of its own."""
    # torch would know, but its import takes longer than a mistake should; with `auto`, a driver stands for a GPU.
    return trainer.accelerator != "cpu" and (
        trainer.accelerator != "auto" or Path("/proc/driver/nvidia/version").exists()
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
