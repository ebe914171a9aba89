"""A generation that is low-rank changes of the first one, as a PEFT adapter; torch is imported where numbers are read.

Source:
    PEFT's documentation of its checkpoints (``developer_guides/checkpoint``), and ``tuners/lora``: ``lora_A`` is
    ``(r, in)``, ``lora_B`` is ``(out, r)``, those of an embedding ``(r, V)`` and ``(D, r)``, and the change is
    ``B A lora_alpha / r``. The names are those of peft 0.21, of which nothing is imported.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.config.parts import TensorName, expert_tensor, router_rows
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.families import read_family
from lifelong_moe.interop.layout.folder import CONFIG
from lifelong_moe.interop.layout.tensors import stored_tensors
from lifelong_moe.interop.single import MATRICES, single_architecture
from lifelong_moe.plan.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from lifelong_moe.interop.export import Source

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens"


def require_adapter(architecture: Architecture, generation: int | None) -> None:
    """Require a generation that may be an adapter of the first one, as far as its architecture tells.

    Raises:
        ConfigError: It is none; names what it has besides.
    """
    if not generation:
        raise ConfigError("--format=peft: the first generation is what adapters are for; export it by --format=hf.")
    born, first = architecture.generations[generation], architecture.generations[0]
    if architecture.tokens_of(generation) > architecture.vocab_size:
        raise ConfigError(
            f"--format=peft: generation {born.stage} reads tokens added to the vocabulary, and an adapter has "
            f"the base's; export it by --format=hf."
        )
    if not born.delta_rank and not born.rank:
        raise ConfigError(
            f"--format=peft: generation {born.stage} has no low-rank changes (trunk.train=deltas or grow.rank)."
        )
    layers = range(architecture.model.layers)
    if born.rank and max(born.experts_in(layer) for layer in layers) > 1:
        raise ConfigError(
            f"--format=peft: generation {born.stage} routes each token to some of several low-rank experts, and an "
            f"adapter of PEFT changes all tokens alike. Export it by --format=hf, or train it with grow.experts=1."
        )
    if born.rank and first.experts > 1:
        raise ConfigError(
            f"--format=peft: generation {born.stage} has a low-rank expert of one expert among {first.experts}, which "
            f"PEFT's files have no form for; export it by --format=hf."
        )
    if not all(born.experts_in(layer) == first.experts_in(layer) for layer in layers):
        raise _own_experts(born.stage)


def unread_adapter(architecture: Architecture, generation: int) -> list[str]:
    """What PEFT cannot do with a generation's adapter, a sentence each."""
    born = architecture.generations[generation]
    if not (architecture.model.tie_embeddings and born.delta_rank):
        return []
    return [
        f"the head and the embedding of the base are one matrix, and generation {born.stage} changes each by itself: "
        f"do not merge this adapter into the base (PEFT warns), --format=hf is merged."
    ]


def _own_experts(name: str) -> ConfigError:
    return ConfigError(
        f"--format=peft: generation {name} has experts of its own, which are no low-rank changes; export it by "
        f"--format=hf."
    )


def require_only_low_rank(source: Source, generation: int) -> None:
    """Require that a generation's experts and router rows are those of the first one, bit for bit.

    Raises:
        ConfigError: They are others.
    """
    import torch

    architecture, tensors = source.architecture, source.tensors
    born = architecture.generations
    for layer in architecture.model.moe_layers:
        first = sum(one.experts_in(layer) for one in born[:generation])
        number = born[0].experts_in(layer)
        if born[generation].rank:  # one change of one expert
            if int(tensors[expert_tensor(layer, first, "base")]) != 0:
                raise _own_experts(born[generation].stage)
            continue
        pairs = [
            (expert_tensor(layer, expert, matrix), expert_tensor(layer, first + expert, matrix))
            for expert in range(number)
            for matrix in MATRICES
        ]
        # Of one expert the weight is 1, whatever its row is.
        pairs += [(router_rows(layer, 0), router_rows(layer, generation))] if number > 1 else []
        if not all(torch.equal(tensors[one], tensors[other]) for one, other in pairs):
            raise _own_experts(born[generation].stage)


def write_adapter(source: Source, generation: int, config: Mapping[str, Any], base: str, folder: Path) -> None:
    """Write a generation's changes as an adapter of the first generation's checkpoint.

    Args:
        source: The model.
        generation: Counted from 0, above 0.
        config: ``config.json`` of the first generation's checkpoint.
        base: Where that is, or its name.
        folder: Is there, and empty.
    """
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().contiguous().clone()
        for module, up, down in _changes(source, generation, config)
        for name, tensor in _named(module, up, down)
    }
    # By the last part of a module's name.
    ranks = {module.rsplit(".", 1)[-1]: up.shape[1] for module, up, _ in _changes(source, generation, config)}
    rank = max(ranks.values())
    others = {name: number for name, number in sorted(ranks.items()) if number != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        # The change is B A lora_alpha / r, and ours has no scale.
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _changes(source: Source, generation: int, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each changed matrix of the checkpoint: its module, and both factors of the change."""
    single, tensors = single_architecture(source.architecture, 0), source.tensors
    born = source.architecture.generations
    for one in stored_tensors(read_family(config, CONFIG), single.model, single.model.experts_by_layer):
        if not one.ours:  # zeros of the base
            continue
        module, name = one.name.removesuffix(".weight"), TensorName.parse(one.ours[0])
        change = f"{one.ours[0].removesuffix('.weight')}.deltas.{generation}"
        if f"{change}.up" in tensors:
            yield module, tensors[f"{change}.up"], tensors[f"{change}.down"]
        elif name.expert is not None and name.layer is not None and born[generation].rank:
            own = sum(before.experts_in(name.layer) for before in born[:generation])
            up, down = (tensors[f"{dataclasses.replace(name, expert=own)}_{factor}"] for factor in "ba")
            # Gate and up matrices are one tensor of ours, and so are their factors.
            yield module, *((up, down) if one.half is None else (up.chunk(2)[one.half], down.chunk(2)[one.half]))
    # A tied head is no tensor of the checkpoint, and changes apart from the embedding.
    if single.model.tie_embeddings and (change := f"head.deltas.{generation}.up") in tensors:
        yield "lm_head", tensors[change], tensors[f"head.deltas.{generation}.down"]


def _named(module: str, up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    if module == EMBEDDING:
        yield f"{PREFIX}{module}.lora_embedding_A", up.T
        yield f"{PREFIX}{module}.lora_embedding_B", down.T
    else:
        yield f"{PREFIX}{module}.lora_A.weight", down
        yield f"{PREFIX}{module}.lora_B.weight", up


def apply_adapter(model: Any, folder: Path) -> None:
    """Add the changes of an adapter that was written to a model of transformers, as PEFT does."""
    import torch
    from safetensors.torch import load_file

    settings, tensors = json.loads((folder / SETTINGS).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    ranks, alphas = settings["rank_pattern"], settings["alpha_pattern"]
    if model.config.tie_word_embeddings and "lm_head" in settings["target_modules"]:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for name, first in tensors.items():
            module, kind = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
            if kind not in ("lora_A", "lora_embedding_A"):
                continue
            last = module.rsplit(".", 1)[-1]
            scale = alphas.get(last, settings["lora_alpha"]) / ranks.get(last, settings["r"])
            # In float32, to which PEFT casts halves.
            change = tensors[name.replace("_A", "_B")].float() @ first.float() * scale
            model.get_submodule(module).weight += change.T if kind == "lora_embedding_A" else change
